//! Which data paths a server offers, and the tasks that serve them.

use crate::config::{Config, ConfigError};
use crate::serve::Context;
use crate::server::ServerError;
use cairn_proto::pb;
use cairn_transfer::shm::sweep;
use cairn_transfer::{QuicServer, RdmaServer, ShmServer, Store, tls};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

fn offer(wire: &str, address: String) -> pb::WireOffer {
    pb::WireOffer { wire: wire.into(), address }
}

/// Listeners that are bound, and what clients are told of them.
pub(crate) struct Wires {
    shm_path: Option<PathBuf>,
    /// TLS over TCP, which is where clients of RDMA come in, too.
    tls: Option<TcpListener>,
    quic: Option<SocketAddr>,
    tls_config: Option<Arc<rustls::ServerConfig>>,
    pub(crate) offers: Vec<pb::WireOffer>,
}

impl Wires {
    /// Finds free places for everything that is configured. `epoch` tells servers of one user apart.
    ///
    /// # Errors
    /// When an address is taken.
    pub(crate) async fn bind(
        config: &Config,
        epoch: u64,
        tls_config: Option<Arc<rustls::ServerConfig>>,
    ) -> Result<Self, ServerError> {
        let shm_path = config.wires.shm.then(|| config.wires.shm_path(epoch));
        let mut wires = Self { shm_path, tls: None, quic: None, tls_config, offers: Vec::new() };
        if wires.tls_config.is_none() {
            return Ok(wires);
        }
        let mut address = config.wires.data_address(config.server.listen);
        if config.wires.tls || config.wires.rdma_listen.is_some() {
            let listener = crate::server::bind("data-listen", address).await?;
            // QUIC takes the same number.
            address = listener.local_addr().unwrap_or(address);
            if config.wires.tls {
                wires.offers.push(offer("tls", format!(":{}", address.port())));
            }
            wires.tls = Some(listener);
        }
        wires.quic = config.wires.quic.then_some(address);
        Ok(wires)
    }

    /// Starts to serve.
    ///
    /// # Errors
    /// When the socket or the UDP port cannot be had.
    pub(crate) fn start(
        &mut self,
        config: &Config,
        context: &Context,
        (stop, tasks): (&CancellationToken, &TaskTracker),
    ) -> Result<Vec<pb::WireOffer>, ServerError> {
        let store: Arc<dyn Store> = Arc::new(context.clone());
        if let Some(path) = &self.shm_path {
            if config.wires.shm_path.is_none() {
                path.parent().into_iter().for_each(sweep);
            }
            match ShmServer::bind(path, config.wires.shm_users.clone(), store.clone()) {
                Ok(server) => {
                    self.offers.push(offer("shm", path.display().to_string()));
                    tasks.spawn(server.run(stop.clone()));
                }
                // Nobody asked for this very place: clients take the next wire.
                Err(error) if config.wires.shm_path.is_none() => {
                    tracing::warn!(%error, "no shared memory for clients on this host");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let Some(tls_config) = &self.tls_config else { return Ok(std::mem::take(&mut self.offers)) };
        if let Some(listener) = self.tls.take() {
            let port = listener.local_addr().map(|address| address.port()).unwrap_or_default();
            let rdma = rdma(config, &store, (stop, tasks));
            if rdma.is_some() {
                self.offers.push(offer("rdma", format!(":{port}")));
            }
            let mut config = rustls::ServerConfig::clone(tls_config);
            config.alpn_protocols = vec![cairn_transfer::ALPN.to_vec()];
            tasks.spawn(tls::serve(store.clone(), (listener, Arc::new(config)), rdma, stop.clone()));
        }
        if let Some(address) = self.quic {
            let options =
                config.wires.quic().map_err(|error: ConfigError| ServerError::Engine(error.into()))?;
            let listen = |source| ServerError::Listen { what: "data-listen", address, source };
            let server = QuicServer::bind(address, tls_config, &options, store).map_err(listen)?;
            let port = server.address().map_err(listen)?.port();
            self.offers.push(offer("quic", format!(":{port}")));
            tasks.spawn(server.run(stop.clone()));
        }
        Ok(std::mem::take(&mut self.offers))
    }
}

/// Starts to let queue pairs in. Without a device there, clients take the next wire.
#[cfg(feature = "rdma")]
fn rdma(
    config: &Config,
    store: &Arc<dyn Store>,
    (stop, tasks): (&CancellationToken, &TaskTracker),
) -> Option<Arc<RdmaServer>> {
    match RdmaServer::bind(config.wires.rdma_listen?) {
        Ok(server) => {
            let server = Arc::new(server);
            tasks.spawn(server.clone().run(store.clone(), stop.clone()));
            Some(server)
        }
        Err(error) => {
            tracing::warn!(%error, "clients take the next wire");
            None
        }
    }
}

#[cfg(not(feature = "rdma"))]
fn rdma(
    _config: &Config,
    _store: &Arc<dyn Store>,
    _tasks: (&CancellationToken, &TaskTracker),
) -> Option<Arc<RdmaServer>> {
    None
}
