//! The API itself as a wire: always there. Its server's end is the `Cache` service.

use crate::Arrivals;
use crate::pack;
use crate::wire::{FetchJob, PublishJob, Wire, WireKind};
use cairn_proto::{Checksum, MissReason, pb};
use futures::FutureExt;
use futures::future::BoxFuture;
use pb::cache_client::CacheClient;
use pb::publish_chunk::Chunk;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// The client of the API, with its token.
pub type Api = CacheClient<InterceptedService<Channel, Bearer>>;

/// Puts a bearer token on every request.
#[derive(Clone, Default)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    /// Without a token, requests go as they are.
    ///
    /// # Errors
    /// When the token has characters that no header can carry.
    pub fn new(token: Option<&str>) -> Result<Self, Status> {
        let Some(token) = token else { return Ok(Self(None)) };
        let mut value: MetadataValue<Ascii> = format!("Bearer {token}")
            .parse()
            .map_err(|_| Status::invalid_argument("a token is made of visible ASCII characters"))?;
        // Never shown in logs.
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// Blocks in messages of the API.
pub struct GrpcWire(Api);

impl GrpcWire {
    /// Over a connection that is there.
    pub fn new(api: Api) -> Self {
        Self(api)
    }

    async fn fetch(&self, job: &FetchJob, arrivals: &mut Arrivals<'_>) -> Result<(), Status> {
        let request = pb::FetchRequest { range_bytes: 0, ..job.request() };
        let mut chunks = self.0.clone().fetch(request).await?.into_inner();
        while let Some(chunk) = chunks.message().await? {
            for piece in &chunk.pieces {
                arrivals.accept(piece.block, piece.offset, &piece.data)?;
            }
            for loss in &chunk.losses {
                let reason = MissReason::try_from(loss.reason());
                arrivals.lost(loss.block, reason.map_err(|error| Status::internal(error.to_string()))?)?;
            }
        }
        Ok(())
    }

    async fn publish(&self, job: &PublishJob) -> Result<Vec<pb::BlockCommit>, Status> {
        let header = pb::PublishHeader { session_id: job.session, reservation_id: job.reservation };
        let sums: Vec<(u32, usize, Checksum)> =
            job.blocks.iter().map(|offer| (offer.position, offer.bytes.len(), offer.checksum)).collect();
        let mut sums = sums.into_iter().peekable();
        let blocks = job.blocks.clone().into_iter().map(|offer| (offer.position, offer.bytes));
        let messages = pack(blocks).map(move |pieces| {
            let ended = |piece: &pb::BlockPiece| {
                let end = piece.offset as usize + piece.data.len();
                let (position, _, checksum) =
                    sums.next_if(|(position, len, _)| *position == piece.block && *len == end)?;
                Some(pb::BlockSeal { block: position, checksum: checksum.0.to_vec().into() })
            };
            let seals = pieces.iter().filter_map(ended).collect();
            Chunk::Pieces(pb::PublishPieces { pieces, seals })
        });
        let messages = std::iter::once(Chunk::Header(header)).chain(messages);
        let messages = messages.map(|chunk| pb::PublishChunk { chunk: Some(chunk) });
        Ok(self.0.clone().publish(futures::stream::iter(messages)).await?.into_inner().commits)
    }
}

impl Wire for GrpcWire {
    fn kind(&self) -> WireKind {
        WireKind::Grpc
    }

    fn fetch<'a>(
        &'a self,
        job: &'a FetchJob,
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>> {
        Self::fetch(self, job, arrivals).boxed()
    }

    fn publish<'a>(&'a self, job: &'a PublishJob) -> BoxFuture<'a, Result<Vec<pb::BlockCommit>, Status>> {
        Self::publish(self, job).boxed()
    }
}
