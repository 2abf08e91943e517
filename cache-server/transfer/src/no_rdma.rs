//! Stands for the RDMA server in builds without the `rdma` feature: there is none, and the compiler knows.

use crate::frame::Link;
use crate::located::Io;
use crate::store::Store;
use std::convert::Infallible;
use std::sync::Arc;
use tonic::Status;

/// Cannot be made.
pub struct RdmaServer(Infallible);

impl RdmaServer {
    pub(crate) async fn serve<S: Io>(
        &self,
        _store: &Arc<dyn Store>,
        _link: &mut Link<S>,
        _session: u64,
    ) -> Result<(), Status> {
        match self.0 {}
    }
}
