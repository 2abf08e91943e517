//! The limit of gRPC on this machine: a stream of the same messages with no store behind it.

use crate::limits::Tls;
use crate::{BenchError, OrFail};
use cairn_proto::{limits, pb};
use futures::{Stream, stream};
use std::hint::black_box;
use std::pin::Pin;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;
type Chunks = Pin<Box<dyn Stream<Item = Result<pb::FetchChunk, Status>> + Send>>;

/// Answers a fetch of `lease_id` bytes with that many bytes out of one buffer, in messages of the usual size.
struct Bare(bytes::Bytes);

#[tonic::async_trait]
impl pb::cache_server::Cache for Bare {
    type SessionStream = stream::Empty<Result<pb::SessionEvent, Status>>;
    type FetchStream = Chunks;

    async fn fetch(&self, request: Request<pb::FetchRequest>) -> Answer<Chunks> {
        let mut left = request.get_ref().lease_id as usize;
        let buffer = self.0.clone();
        let chunks = std::iter::from_fn(move || {
            let size = left.min(limits::CHUNK_BYTES);
            left -= size;
            let piece = pb::BlockPiece { block: 0, offset: 0, data: buffer.slice(..size) };
            (size > 0).then(|| Ok(pb::FetchChunk { pieces: vec![piece], losses: Vec::new() }))
        });
        Ok(Response::new(Box::pin(stream::iter(chunks))))
    }

    async fn session(&self, _: Request<pb::SessionRequest>) -> Answer<Self::SessionStream> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn open_space(&self, _: Request<pb::OpenSpaceRequest>) -> Answer<pb::OpenSpaceResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn lookup(&self, _: Request<pb::LookupRequest>) -> Answer<pb::LookupResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn reserve(&self, _: Request<pb::ReserveRequest>) -> Answer<pb::ReserveResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn publish(&self, _: Request<Streaming<pb::PublishChunk>>) -> Answer<pb::PublishResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn abort(&self, _: Request<pb::AbortRequest>) -> Answer<pb::AbortResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn renew_lease(&self, _: Request<pb::RenewLeaseRequest>) -> Answer<pb::RenewLeaseResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn release_lease(&self, _: Request<pb::ReleaseLeaseRequest>) -> Answer<pb::ReleaseLeaseResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn report_corrupt(
        &self,
        _: Request<pb::ReportCorruptRequest>,
    ) -> Answer<pb::ReportCorruptResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
    async fn explain(&self, _: Request<pb::ExplainRequest>) -> Answer<pb::ExplainResponse> {
        Err(Status::unimplemented("a bare stream"))
    }
}

/// A tonic server with TLS and no store, on another runtime, and a client of it.
///
/// # Errors
/// When loopback cannot be listened on.
pub async fn bare_tonic(
    tls: &Tls,
    servers: &Handle,
) -> Result<pb::cache_client::CacheClient<Channel>, BenchError> {
    let bound = servers.spawn(TcpListener::bind("127.0.0.1:0")).await.or_fail("no panic")?;
    let listener = bound.or_fail("a free port")?;
    let address = listener.local_addr().or_fail("an address")?;
    let bare = Bare(vec![5u8; limits::CHUNK_BYTES].into());
    let service =
        pb::cache_server::CacheServer::new(bare).max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let read = |path: &std::path::Path| std::fs::read(path).or_fail("a certificate");
    let identity = Identity::from_pem(read(&tls.certs.server.0)?, read(&tls.certs.server.1)?);
    let server = tonic::transport::Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .or_fail("TLS")?
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(32 << 20)
        .add_service(service)
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    servers.spawn(server);
    let ca = Certificate::from_pem(read(&tls.certs.ca)?);
    let endpoint =
        tonic::transport::Endpoint::from_shared(format!("https://{address}")).or_fail("an endpoint")?;
    let channel = endpoint
        .tls_config(ClientTlsConfig::new().ca_certificate(ca))
        .or_fail("TLS")?
        .tcp_nodelay(true)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(32 << 20)
        .connect()
        .await
        .or_fail("connected")?;
    Ok(pb::cache_client::CacheClient::new(channel).max_decoding_message_size(limits::MAX_MESSAGE_BYTES))
}

/// Asks a bare server for that many bytes, and drops them.
///
/// # Errors
/// When the stream fails.
pub async fn tonic_get(
    client: &pb::cache_client::CacheClient<Channel>,
    bytes: usize,
) -> Result<(), BenchError> {
    let request = pb::FetchRequest { lease_id: bytes as u64, ..Default::default() };
    let mut chunks = client.clone().fetch(request).await.or_fail("a stream")?.into_inner();
    while let Some(chunk) = chunks.message().await.or_fail("a message")? {
        black_box(chunk);
    }
    Ok(())
}
