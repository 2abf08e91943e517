//! What operators ask.

use crate::client::{CacheClient, ClientError, until};
use cairn_proto::{BlockHash, SpaceId, pb};
use tokio::time::Instant;

impl CacheClient {
    /// Where blocks are, or what became of them.
    ///
    /// # Errors
    /// When the server cannot be reached or does not know the space.
    pub async fn explain(
        &self,
        space: SpaceId,
        hashes: &[BlockHash],
    ) -> Result<Vec<pb::BlockExplanation>, ClientError> {
        let deadline = Instant::now() + self.options().connect_timeout;
        let connection = self.connection(deadline).await.map_err(|_| self.unreachable())?;
        let block_hashes = BlockHash::concat(hashes);
        let request = pb::ExplainRequest { space_id: space.0.to_vec().into(), block_hashes };
        Ok(until(deadline, connection.grpc.clone().explain(request)).await?.blocks)
    }

    /// Totals and what is held now.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn stats(&self) -> Result<pb::StatsResponse, ClientError> {
        let deadline = Instant::now() + self.options().connect_timeout;
        let connection = self.connection(deadline).await.map_err(|_| self.unreachable())?;
        Ok(until(deadline, connection.admin.clone().stats(pb::StatsRequest {})).await?)
    }

    /// Removes all blocks of a space; returns how many.
    ///
    /// # Errors
    /// When the server cannot be reached or does not know the space.
    pub async fn flush(&self, space: SpaceId) -> Result<u64, ClientError> {
        let deadline = Instant::now() + self.options().connect_timeout;
        let connection = self.connection(deadline).await.map_err(|_| self.unreachable())?;
        let request = pb::FlushRequest { space_id: space.0.to_vec().into() };
        Ok(until(deadline, connection.admin.clone().flush(request)).await?.removed_blocks)
    }

    /// Takes one of the server's configured directories into service.
    ///
    /// # Errors
    /// When the server cannot be reached or cannot use the directory.
    pub async fn attach_device(&self, path: &str) -> Result<(), ClientError> {
        let deadline = Instant::now() + self.options().connect_timeout;
        let connection = self.connection(deadline).await.map_err(|_| self.unreachable())?;
        let request = pb::AttachDeviceRequest { path: path.to_owned() };
        until(deadline, connection.admin.clone().attach_device(request)).await?;
        Ok(())
    }

    /// Takes one of the server's configured directories out of service.
    ///
    /// # Errors
    /// When the server cannot be reached or does not have the directory in service.
    pub async fn detach_device(&self, path: &str) -> Result<(), ClientError> {
        let deadline = Instant::now() + self.options().connect_timeout;
        let connection = self.connection(deadline).await.map_err(|_| self.unreachable())?;
        let request = pb::DetachDeviceRequest { path: path.to_owned() };
        until(deadline, connection.admin.clone().detach_device(request)).await?;
        Ok(())
    }
}
