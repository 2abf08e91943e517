//! Servers and workers as processes of their own, for commands that show or measure them.

mod process;
mod secure;

pub(crate) use process::Process;
pub(crate) use secure::Secure;
