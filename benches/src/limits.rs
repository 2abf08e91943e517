//! What a wire could do at best on this machine: the same bytes through loopback with no store and no verification.

use crate::{BenchError, OrFail};
use cairn_proto::limits::CHUNK_BYTES;
use cairn_transfer::quic::MAX_MTU;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Certificates of a run.
pub struct Tls {
    /// Its files.
    pub certs: cairn_server::certs::Certs,
    _folder: tempfile::TempDir,
}

impl Tls {
    /// For loopback.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new() -> Result<Self, BenchError> {
        let folder = tempfile::tempdir().or_fail("a folder")?;
        let options = cairn_server::certs::CertsOptions {
            dir: folder.path().to_owned(),
            hosts: vec!["127.0.0.1".into()],
            valid: Duration::from_secs(86_400),
        };
        Ok(Self { certs: cairn_server::certs::make(&options).or_fail("certificates")?, _folder: folder })
    }

    fn chain(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>, BenchError> {
        let pem = std::fs::read(path).or_fail("a file")?;
        CertificateDer::pem_slice_iter(&pem).map(|one| one.or_fail("a certificate")).collect()
    }

    /// Of the server's side.
    ///
    /// # Errors
    /// When a file is gone.
    pub fn server(&self) -> Result<rustls::ServerConfig, BenchError> {
        let key = std::fs::read(&self.certs.server.1).or_fail("a file")?;
        let key = PrivateKeyDer::from_pem_slice(&key).or_fail("a key")?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .or_fail("TLS 1.3")?
            .with_no_client_auth()
            .with_single_cert(Self::chain(&self.certs.server.0)?, key)
            .or_fail("a certificate")
    }

    /// Of the client's side.
    ///
    /// # Errors
    /// When a file is gone.
    pub fn client(&self) -> Result<rustls::ClientConfig, BenchError> {
        let mut roots = rustls::RootCertStore::empty();
        for one in Self::chain(&self.certs.ca)? {
            roots.add(one).or_fail("a certificate")?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        Ok(rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .or_fail("TLS 1.3")?
            .with_root_certificates(roots)
            .with_no_client_auth())
    }
}

/// Answers each 8-byte request for n bytes with that many.
async fn answer<S: AsyncRead + AsyncWrite + Unpin>(mut socket: S) {
    let buffer = vec![5u8; CHUNK_BYTES];
    while let Ok(mut left) = socket.read_u64().await {
        while left > 0 {
            let size = left.min(buffer.len() as u64);
            if socket.write_all(&buffer[..size as usize]).await.is_err() {
                return;
            }
            left -= size;
        }
        let _ = socket.flush().await;
    }
}

/// One connection to a bare server.
pub enum Bare {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TLS over TCP.
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
    /// A QUIC connection.
    Quic { connection: quinn::Connection, _endpoint: quinn::Endpoint },
}

impl Bare {
    /// Asks once for as many bytes as the buffers hold together, and waits for them.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn get(&mut self, buffers: &mut [Vec<u8>]) -> Result<(), BenchError> {
        match self {
            Self::Tcp(socket) => ask(socket, buffers).await,
            Self::Unix(socket) => ask(socket, buffers).await,
            Self::Tls(socket) => ask(&mut **socket, buffers).await,
            Self::Quic { connection, .. } => {
                let (send, receive) = connection.open_bi().await.or_fail("a stream")?;
                ask(&mut tokio::io::join(receive, send), buffers).await
            }
        }
    }
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut S,
    buffers: &mut [Vec<u8>],
) -> Result<(), BenchError> {
    let bytes: usize = buffers.iter().map(Vec::len).sum();
    socket.write_all(&(bytes as u64).to_be_bytes()).await.or_fail("sent")?;
    socket.flush().await.or_fail("sent")?;
    for buffer in buffers {
        socket.read_exact(buffer).await.or_fail("received")?;
    }
    Ok(())
}

/// Bare servers, until the process ends.
pub struct Servers {
    tcp: SocketAddr,
    tls: SocketAddr,
    unix: PathBuf,
    quic: SocketAddr,
    mtu: u16,
    client: rustls::ClientConfig,
    _folder: tempfile::TempDir,
}

/// The same settings as Cairn's own.
fn transport(mtu: u16) -> quinn::TransportConfig {
    let mut transport = quinn::TransportConfig::default();
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(mtu);
    transport
        .initial_mtu(1200)
        .mtu_discovery_config(Some(discovery))
        .stream_receive_window((8u32 << 20).into())
        .receive_window((16u32 << 20).into())
        .send_window(16 << 20);
    transport
}

fn udp() -> Result<std::net::UdpSocket, BenchError> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").or_fail("a port")?;
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, 4 << 20);
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 4 << 20);
    Ok(socket)
}

fn endpoint_config() -> Result<quinn::EndpointConfig, BenchError> {
    let mut config = quinn::EndpointConfig::default();
    config.max_udp_payload_size(MAX_MTU).or_fail("a valid size")?;
    Ok(config)
}

impl Servers {
    /// Starts all of them; QUIC sends packets of up to `mtu` bytes.
    ///
    /// # Errors
    /// When loopback cannot be listened on.
    pub async fn start(tls: &Tls, mtu: u16) -> Result<Self, BenchError> {
        let folder = tempfile::tempdir().or_fail("a folder")?;
        let listener = TcpListener::bind("127.0.0.1:0").await.or_fail("a port")?;
        let tcp = listener.local_addr().or_fail("an address")?;
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                // Without it the first rounds show it.
                let _ = socket.set_nodelay(true);
                tokio::spawn(answer(socket));
            }
        });
        let unix = folder.path().join("bare.sock");
        let listener = UnixListener::bind(&unix).or_fail("a socket")?;
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(answer(socket));
            }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.or_fail("a port")?;
        let secure = listener.local_addr().or_fail("an address")?;
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls.server()?));
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let _ = socket.set_nodelay(true);
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    if let Ok(socket) = acceptor.accept(socket).await {
                        answer(socket).await;
                    }
                });
            }
        });
        let quic = Self::quic_server(tls, mtu)?;
        Ok(Self { tcp, tls: secure, unix, quic, mtu, client: tls.client()?, _folder: folder })
    }

    fn quic_server(tls: &Tls, mtu: u16) -> Result<SocketAddr, BenchError> {
        let mut server = tls.server()?;
        server.alpn_protocols = vec![b"bare".to_vec()];
        let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(server).or_fail("TLS for QUIC")?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport(mtu)));
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(endpoint_config()?, Some(config), udp()?, runtime);
        let endpoint = endpoint.or_fail("an endpoint")?;
        let address = endpoint.local_addr().or_fail("an address")?;
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                tokio::spawn(async move {
                    let Ok(connection) = incoming.await else { return };
                    while let Ok((send, receive)) = connection.accept_bi().await {
                        tokio::spawn(answer(tokio::io::join(receive, send)));
                    }
                });
            }
        });
        Ok(address)
    }

    /// A connection of each kind.
    ///
    /// # Errors
    /// When it cannot be had.
    pub async fn connect(&self) -> Result<Vec<(&'static str, Bare)>, BenchError> {
        let tcp = TcpStream::connect(self.tcp).await.or_fail("connected")?;
        tcp.set_nodelay(true).or_fail("an option")?;
        let socket = TcpStream::connect(self.tls).await.or_fail("connected")?;
        socket.set_nodelay(true).or_fail("an option")?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.client.clone()));
        let name = ServerName::try_from("127.0.0.1").or_fail("a name")?;
        let tls = connector.connect(name, socket).await.or_fail("TLS")?;
        let mut client = self.client.clone();
        client.alpn_protocols = vec![b"bare".to_vec()];
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(client).or_fail("TLS for QUIC")?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport(self.mtu)));
        let endpoint = quinn::Endpoint::new(endpoint_config()?, None, udp()?, Arc::new(quinn::TokioRuntime))
            .or_fail("UDP")?;
        let connecting = endpoint.connect_with(config, self.quic, "127.0.0.1").or_fail("an address")?;
        let connection = connecting.await.or_fail("connected")?;
        let unix = UnixStream::connect(&self.unix).await.or_fail("connected")?;
        Ok(vec![
            ("raw unix socket", Bare::Unix(unix)),
            ("raw tcp", Bare::Tcp(tcp)),
            ("bare tls", Bare::Tls(Box::new(tls))),
            ("bare quinn", Bare::Quic { connection, _endpoint: endpoint }),
        ])
    }
}
