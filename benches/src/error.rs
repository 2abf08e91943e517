//! What stops a bench, in words for people.

use std::fmt::Display;
use thiserror::Error;

/// A bench that cannot go on.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct BenchError(pub String);

/// Says what was being done when something failed.
pub trait OrFail<T> {
    /// Names it.
    ///
    /// # Errors
    /// When it failed.
    fn or_fail(self, what: &str) -> Result<T, BenchError>;
}

impl<T, E: Display> OrFail<T> for Result<T, E> {
    fn or_fail(self, what: &str) -> Result<T, BenchError> {
        self.map_err(|error| BenchError(format!("{what}: {error}")))
    }
}

impl<T> OrFail<T> for Option<T> {
    fn or_fail(self, what: &str) -> Result<T, BenchError> {
        self.ok_or_else(|| BenchError(what.to_owned()))
    }
}
