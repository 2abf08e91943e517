//! The limits of a wire on this machine: what loopback carries with no store behind it.

use cairn_proto::{limits, pb};
use futures::{Stream, stream};
use std::hint::black_box;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;
type Chunks = Pin<Box<dyn Stream<Item = Result<pb::FetchChunk, Status>> + Send>>;

/// Echo ends, listening on loopback.
pub struct Limits {
    tonic: pb::cache_client::CacheClient<Channel>,
    tcp: SocketAddr,
}

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

impl Limits {
    /// Starts the echo ends; they end with the process.
    ///
    /// # Panics
    /// When loopback cannot be listened on.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let grpc = listener.local_addr().expect("an address");
        let bare = Bare(vec![5u8; limits::CHUNK_BYTES].into());
        let service =
            pb::cache_server::CacheServer::new(bare).max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        tokio::spawn(
            tonic::transport::Server::builder()
                .initial_stream_window_size(8 << 20)
                .initial_connection_window_size(32 << 20)
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))),
        );
        let endpoint =
            tonic::transport::Endpoint::from_shared(format!("http://{grpc}")).expect("a valid endpoint");
        let channel = endpoint
            .tcp_nodelay(true)
            .initial_stream_window_size(8 << 20)
            .initial_connection_window_size(32 << 20)
            .connect_lazy();
        let tonic =
            pb::cache_client::CacheClient::new(channel).max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let tcp = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                socket.set_nodelay(true).expect("an option");
                tokio::spawn(async move {
                    let buffer = vec![5u8; limits::CHUNK_BYTES];
                    while let Ok(mut left) = socket.read_u64().await {
                        while left > 0 {
                            let size = left.min(buffer.len() as u64);
                            if socket.write_all(&buffer[..size as usize]).await.is_err() {
                                return;
                            }
                            left -= size;
                        }
                    }
                });
            }
        });
        Self { tonic, tcp }
    }

    /// GB/s of a bare tonic stream: requests for `bytes` each, one after the other.
    ///
    /// # Panics
    /// When the stream fails.
    pub async fn tonic(&self, bytes: usize, repeats: usize) -> f64 {
        let start = Instant::now();
        for _ in 0..repeats {
            let request = pb::FetchRequest { lease_id: bytes as u64, ..Default::default() };
            let mut chunks = self.tonic.clone().fetch(request).await.expect("a stream").into_inner();
            while let Some(chunk) = chunks.message().await.expect("a message") {
                black_box(chunk);
            }
        }
        (bytes * repeats) as f64 / start.elapsed().as_secs_f64() / 1e9
    }

    /// GB/s of a plain TCP stream, asked for in the same way, read into one buffer.
    ///
    /// # Panics
    /// When the connection fails.
    pub async fn tcp(&self, bytes: usize, repeats: usize) -> f64 {
        let mut socket = TcpStream::connect(self.tcp).await.expect("connected");
        socket.set_nodelay(true).expect("an option");
        let mut buffer = vec![0u8; bytes];
        let start = Instant::now();
        for _ in 0..repeats {
            socket.write_u64(bytes as u64).await.expect("sent");
            socket.read_exact(&mut buffer).await.expect("received");
        }
        (bytes * repeats) as f64 / start.elapsed().as_secs_f64() / 1e9
    }
}

/// GB/s of copying a buffer of that size.
pub fn memcpy(bytes: usize, repeats: usize) -> f64 {
    let source = vec![5u8; bytes];
    let mut target = vec![0u8; bytes];
    let start = Instant::now();
    for _ in 0..repeats {
        black_box(&mut target).copy_from_slice(black_box(&source));
    }
    (bytes * repeats) as f64 / start.elapsed().as_secs_f64() / 1e9
}
