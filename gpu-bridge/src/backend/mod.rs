//! The devices: `host` is always there, `cuda` where there is one.

#[allow(unsafe_code)]
pub mod cuda;
pub mod host;
