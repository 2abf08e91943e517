//! Both ends in one process: the server's bytes are copied straight into the caller's memory, and back. For servers that are
//! embedded, and as the plainest case of everything that a wire must do.

use crate::Arrivals;
use crate::copy::copy;
use crate::store::{Reach, Receiving, Store};
use crate::wire::{FetchJob, PublishJob, Wire, WireKind};
use cairn_proto::pb;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use std::sync::Arc;
use tonic::Status;

/// A store in this process.
pub struct MemWire(Arc<dyn Store>);

impl MemWire {
    /// The wire to this store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self(store)
    }
}

impl Wire for MemWire {
    fn kind(&self) -> WireKind {
        WireKind::Mem
    }

    fn fetch<'a>(
        &'a self,
        job: &'a FetchJob,
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>> {
        let work = async move {
            let positions = (job.blocks.start, job.blocks.len());
            let mut reading =
                self.0.read(WireKind::Mem, job.session, job.lease, positions, Reach::default())?;
            while let Some((block, brought)) = reading.blocks.next().await {
                match brought {
                    Ok(brought) => {
                        arrivals.copy_from(block, &brought.bytes)?;
                        self.0.sent(WireKind::Mem, brought.bytes.len() as u64);
                    }
                    Err(reason) => arrivals.lost(block, reason)?,
                }
            }
            Ok(())
        };
        work.boxed()
    }

    fn publish<'a>(&'a self, job: &'a PublishJob) -> BoxFuture<'a, Result<Vec<pb::BlockCommit>, Status>> {
        let work = async move {
            let filling = self.0.fill(WireKind::Mem, job.session, job.reservation)?;
            let mut receiving = Receiving::new(self.0.clone(), filling);
            for offer in &job.blocks {
                receiving.whole(offer.position, offer.checksum, |space, hash, target| {
                    if target.len() != offer.bytes.len() {
                        return Err(Status::invalid_argument("a block of another size"));
                    }
                    Ok(copy(space, hash, &offer.bytes, target))
                })?;
            }
            Ok(receiving.finish().commits)
        };
        work.boxed()
    }
}
