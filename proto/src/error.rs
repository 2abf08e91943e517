//! What the receiver of an error should do about it. Precise causes live in each package; this is the coarse form
//! that crosses package and process boundaries.

use thiserror::Error;

/// What a caller should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The input is wrong; the same call can never succeed.
    FixInput,
    /// The session, lease, reservation or space is gone; open it anew.
    Reopen,
    /// Nothing is wrong with the call; try again later.
    Retry,
    /// The other side is broken or speaks another version.
    GiveUp,
}

/// A value from outside that no domain type can hold.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Invalid {
    /// A byte field has the wrong length.
    #[error("{field} has {actual} bytes; it must have {expected}")]
    Length {
        /// Name of the field.
        field: &'static str,
        /// Length found, in bytes.
        actual: usize,
        /// What would be right.
        expected: &'static str,
    },
    /// A number is out of its range.
    #[error("{field} is {actual}; it must be {expected}")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// Value found.
        actual: u64,
        /// What would be right.
        expected: String,
    },
    /// A required field is absent or an enum value is unknown to this build.
    #[error("{field} is missing or unknown to this version")]
    Missing {
        /// Name of the field.
        field: &'static str,
    },
}

impl Invalid {
    /// An out-of-range number.
    pub fn range(field: &'static str, actual: u64, expected: impl Into<String>) -> Self {
        Self::Range { field, actual, expected: expected.into() }
    }
}

impl From<Invalid> for tonic::Status {
    fn from(invalid: Invalid) -> Self {
        Self::invalid_argument(invalid.to_string())
    }
}

impl From<&tonic::Status> for ErrorKind {
    fn from(status: &tonic::Status) -> Self {
        use tonic::Code;
        match status.code() {
            Code::InvalidArgument | Code::OutOfRange | Code::PermissionDenied | Code::Unauthenticated => {
                Self::FixInput
            }
            Code::NotFound | Code::FailedPrecondition => Self::Reopen,
            Code::Unimplemented | Code::Internal | Code::DataLoss => Self::GiveUp,
            _ => Self::Retry,
        }
    }
}
