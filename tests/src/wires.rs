//! A server with every wire that works here, and the ends of wires without a client around them: what the conformance suite needs.

use crate::config;
use cairn_client::{CacheClient, ClientOptions, Security, WireKind};
use cairn_proto::{BlockHash, Checksum, KeySpace, limits, pb};
use cairn_server::certs::{Certs, CertsOptions, make};
use cairn_server::{Config, Server};
use cairn_transfer::store::SessionKey;
use cairn_transfer::{
    Api, Arrival, Arrivals, Bearer, FetchJob, GrpcWire, MemWire, Offer, Promise, PublishJob, QuicOptions,
    QuicWire, ShmWire, TlsWire, Wire,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// The wires to test: those that need nothing but this machine; or RDMA alone, where there is a device for it.
pub fn wires() -> Vec<WireKind> {
    match rdma_address() {
        Some(_) => vec![WireKind::Rdma],
        None => vec![WireKind::Mem, WireKind::Shm, WireKind::Quic, WireKind::Tls, WireKind::Grpc],
    }
}

/// An address of an RDMA device that tests may use: the first in `CAIRN_RDMA`, in builds that can.
///
/// # Panics
/// When it is none.
pub fn rdma_address() -> Option<IpAddr> {
    #[allow(clippy::disallowed_methods)]
    let text = std::env::var("CAIRN_RDMA").ok().filter(|_| cairn_transfer::HAS_RDMA)?;
    text.split(',').next().map(|address| address.parse().expect("an IP address"))
}

/// Certificates for loopback, good for an hour.
///
/// # Panics
/// When they cannot be made.
pub fn certs(folder: &Path) -> Certs {
    let hosts = vec!["127.0.0.1".into(), "localhost".into()];
    let options = CertsOptions { dir: folder.to_owned(), hosts, valid: Duration::from_secs(3600) };
    make(&options).expect("certificates")
}

/// `config` with TLS.
pub fn with_tls(mut config: Config, certs: &Certs) -> Config {
    config.tls.cert_file = Some(certs.server.0.clone());
    config.tls.key_file = Some(certs.server.1.clone());
    config.wires.data_listen = Some(([127, 0, 0, 1], 0).into());
    config.wires.rdma_listen = rdma_address().map(|address| (address, 0).into());
    if config.wires.rdma_listen.is_some() {
        // The fabric of the tests is that of a virtual machine, which may be a slow one.
        config.server.allow_insecure_network = true;
        config.limits.handshake_ms = 60_000;
    }
    config
}

/// Options of a client that trusts these certificates.
pub fn options(server: &Server, ca: &Path) -> ClientOptions {
    let mut options = ClientOptions::new(format!("https://{}", server.address()));
    options.security = Security { ca_file: Some(ca.to_owned()), ..Security::default() };
    options.lookup_timeout = Duration::from_secs(5);
    options
}

/// A server with TLS.
pub struct Site {
    /// It.
    pub server: Server,
    /// Its certificates.
    pub certs: Certs,
    _folder: TempDir,
}

impl Site {
    /// Room for `slots` blocks of [`crate::space`].
    pub async fn start(slots: u64) -> Self {
        Self::with(config(slots)).await
    }

    /// A server with these settings, and TLS.
    ///
    /// # Panics
    /// When it cannot start.
    pub async fn with(config: Config) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let certs = certs(folder.path());
        let server = Server::start(with_tls(config, &certs)).await.expect("a server");
        Self { server, certs, _folder: folder }
    }

    /// A client that uses one wire only, and whatever works if that is `None`.
    ///
    /// # Panics
    /// When the options are wrong.
    pub fn client(&self, wire: Option<WireKind>) -> CacheClient {
        let mut options = options(&self.server, &self.certs.ca);
        options.wire = wire;
        CacheClient::start(options).expect("good options")
    }

    /// A session by hand, as soon as there is room for its connection.
    ///
    /// # Panics
    /// When there is none for ten seconds.
    pub async fn session_when_possible(&self) -> Session {
        for _ in 0..100 {
            if let Ok(session) = Session::try_open(&self.server, &self.certs.ca, None).await {
                return session;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("no room for a session");
    }

    /// A session by hand.
    pub async fn session(&self) -> Session {
        Session::open(&self.server, &self.certs.ca).await
    }
}

/// A session without a client around it.
pub struct Session {
    /// The API.
    pub api: Api,
    /// Its number.
    pub id: u64,
    /// Its key.
    pub key: SessionKey,
    /// What the server offers.
    pub offers: Vec<pb::WireOffer>,
    /// The session ends with it.
    pub events: tonic::Streaming<pb::SessionEvent>,
    ca: PathBuf,
}

impl Session {
    /// Opens one.
    ///
    /// # Panics
    /// When the server does not.
    pub async fn open(server: &Server, ca: &Path) -> Self {
        Self::open_with(server, ca, None).await
    }

    /// Opens one with a token.
    ///
    /// # Panics
    /// When the server does not.
    pub async fn open_with(server: &Server, ca: &Path, token: Option<&str>) -> Self {
        Self::try_open(server, ca, token).await.expect("a session")
    }

    async fn try_open(server: &Server, ca: &Path, token: Option<&str>) -> Result<Self, tonic::Status> {
        let pem = std::fs::read(ca).expect("a certificate");
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
        let endpoint = Endpoint::from_shared(format!("https://{}", server.address())).expect("an endpoint");
        let channel: Channel = endpoint
            .tls_config(tls)
            .expect("TLS")
            .connect()
            .await
            .map_err(|e| tonic::Status::unavailable(e.to_string()))?;
        let bearer = Bearer::new(token).expect("a token");
        let mut api = Api::new(InterceptedService::new(channel, bearer))
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        let request = pb::SessionRequest { client_name: "by hand".into(), api_version: limits::API_VERSION };
        let mut events = api.session(request).await?.into_inner();
        let first = events.message().await.expect("an event").expect("an event").event;
        let Some(pb::session_event::Event::Opened(opened)) = first else { panic!("{first:?}") };
        let key = opened.session_key.as_ref().try_into().expect("32 bytes");
        let (id, offers) = (opened.session_id, opened.wires);
        Ok(Self { api, id, key, offers, events, ca: ca.to_owned() })
    }

    /// Where the server offers a wire.
    ///
    /// # Panics
    /// When it does not.
    pub fn offer(&self, kind: WireKind) -> String {
        let offer = self.offers.iter().find(|offer| offer.wire == kind.name());
        offer.expect("the wire is offered").address.clone()
    }

    /// Goes elsewhere for a wire from now on.
    pub fn redirect(&mut self, kind: WireKind, address: &str) {
        for offer in self.offers.iter_mut().filter(|offer| offer.wire == kind.name()) {
            offer.address = address.to_owned();
        }
    }

    /// TLS settings for data connections.
    ///
    /// # Panics
    /// When the certificate is none.
    pub fn tls(&self) -> Arc<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        let pem = std::fs::read(&self.ca).expect("a certificate");
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            roots.add(certificate.expect("a certificate")).expect("a certificate");
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3");
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![cairn_transfer::ALPN.to_vec()];
        Arc::new(config)
    }

    /// The client's end of a wire.
    ///
    /// # Errors
    /// When the server refuses it.
    ///
    /// # Panics
    /// For RDMA, in a build without it.
    pub async fn wire(&self, server: &Server, kind: WireKind) -> Result<Arc<dyn Wire>, tonic::Status> {
        self.wire_with(server, kind, self.key).await
    }

    /// As [`Self::wire`], with another key.
    ///
    /// # Errors
    /// When the server refuses it.
    ///
    /// # Panics
    /// For RDMA, in a build without it.
    pub async fn wire_with(
        &self,
        server: &Server,
        kind: WireKind,
        key: SessionKey,
    ) -> Result<Arc<dyn Wire>, tonic::Status> {
        Ok(match kind {
            WireKind::Mem => Arc::new(MemWire::new(server.store())),
            WireKind::Grpc => Arc::new(GrpcWire::new(self.api.clone())),
            WireKind::Shm => Arc::new(ShmWire::connect(Path::new(&self.offer(kind)), self.id, key).await?),
            #[cfg(feature = "rdma")]
            WireKind::Rdma => {
                let address = format!("127.0.0.1{}", self.offer(kind));
                let name = ServerName::try_from("127.0.0.1").expect("a name");
                Arc::new(cairn_transfer::RdmaWire::connect(self.tls(), (address, name), self.id, key).await?)
            }
            #[cfg(not(feature = "rdma"))]
            WireKind::Rdma => panic!("a build without RDMA"),
            WireKind::Tls => {
                let address = format!("127.0.0.1{}", self.offer(kind));
                let name = ServerName::try_from("127.0.0.1").expect("a name");
                Arc::new(TlsWire::connect(self.tls(), (address, name), self.id, key).await?)
            }
            WireKind::Quic => Arc::new(self.quic(QuicOptions::default(), key).await?),
        })
    }

    /// QUIC with these options.
    ///
    /// # Errors
    /// When the server refuses it.
    ///
    /// # Panics
    /// When the server does not offer it.
    pub async fn quic(&self, options: QuicOptions, key: SessionKey) -> Result<QuicWire, tonic::Status> {
        let address = format!("127.0.0.1{}", self.offer(WireKind::Quic)).parse().expect("an address");
        QuicWire::connect(&self.tls(), (address, "127.0.0.1"), &options, (self.id, key)).await
    }

    /// Declares a space.
    ///
    /// # Panics
    /// When the server refuses it.
    pub async fn declare(&self, space: &KeySpace) {
        let request = pb::OpenSpaceRequest { session_id: self.id, space: Some(space.into()) };
        self.api.clone().open_space(request).await.expect("declared");
    }

    /// Reserves room for a chain.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn reserve(&self, space: &KeySpace, chain: &[BlockHash]) -> u64 {
        let request = pb::ReserveRequest {
            session_id: self.id,
            space_id: space.id().0.to_vec().into(),
            block_hashes: BlockHash::concat(chain),
            ttl_ms: 60_000,
            ..Default::default()
        };
        self.api.clone().reserve(request).await.expect("an answer").into_inner().reservation_id
    }

    /// Leases a chain: the lease, and the checksums of its blocks.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn lease(&self, space: &KeySpace, chain: &[BlockHash], ttl_ms: u32) -> (u64, Vec<Checksum>) {
        let request = pb::LookupRequest {
            session_id: self.id,
            space_id: space.id().0.to_vec().into(),
            block_hashes: BlockHash::concat(chain),
            lease_ttl_ms: ttl_ms,
            ..Default::default()
        };
        let found = self.api.clone().lookup(request).await.expect("an answer").into_inner();
        let count = found.checksums.len() / 16;
        (found.lease_id, Checksum::parse_list(&found.checksums, count).expect("checksums"))
    }

    /// Gives a lease up.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn release(&self, lease: u64) {
        let request =
            pb::ReleaseLeaseRequest { session_id: self.id, lease_ids: vec![lease], ..Default::default() };
        self.api.clone().release_lease(request).await.expect("released");
    }

    /// Reads `blocks` of a lease over a wire, whole blocks at a time: what became of each, and its bytes.
    ///
    /// # Errors
    /// What the wire says.
    pub async fn fetch(
        &self,
        wire: &dyn Wire,
        (space, chain, checksums): (&KeySpace, &[BlockHash], &[Checksum]),
        lease: u64,
        blocks: std::ops::Range<usize>,
    ) -> Result<Vec<(Option<Arrival>, Vec<u8>)>, tonic::Status> {
        let block_bytes = space.block_bytes();
        let promise = Promise { space: space.id(), block_bytes, hashes: chain, checksums };
        let mut memory = vec![vec![0xEEu8; block_bytes as usize]; blocks.len()];
        let targets = memory.iter_mut().map(Vec::as_mut_slice).collect();
        let mut arrivals = Arrivals::new(promise, blocks.start, targets);
        let job = FetchJob { session: self.id, lease, blocks, locations: Arc::from([]), range_bytes: 0 };
        wire.fetch(&job, &mut arrivals).await?;
        let found = arrivals.found().to_vec();
        Ok(found.into_iter().zip(memory).collect())
    }

    /// A job that fills a reservation of this chain with what tests store.
    pub fn offer_all(&self, space: &KeySpace, chain: &[BlockHash], reservation: u64) -> PublishJob {
        let offer = |(position, block): (u32, cairn_client::Block)| Offer {
            position,
            hash: block.hash,
            bytes: block.bytes,
            checksum: block.checksum,
        };
        let blocks = (0..).zip(crate::blocks(space, chain)).map(offer).collect();
        PublishJob { session: self.id, reservation, space: space.id(), blocks }
    }
}
