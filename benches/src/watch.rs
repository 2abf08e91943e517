//! How a bench tells of its way, and hears that it should end.

/// Whoever looks at a bench.
pub trait Watch: Send + Sync {
    /// So many steps will come.
    fn begin(&self, steps: usize);

    /// One begins.
    fn step(&self, what: &str);

    /// End at the next opportunity, with what there is.
    fn stopped(&self) -> bool;
}

/// Nobody looks.
pub struct Unwatched;

impl Watch for Unwatched {
    fn begin(&self, _steps: usize) {}

    fn step(&self, _what: &str) {}

    fn stopped(&self) -> bool {
        false
    }
}
