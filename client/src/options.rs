//! How a client behaves. Every time is a bound that the caller feels.

use std::time::Duration;

/// Settings of a [`crate::CacheClient`].
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Where the server is, as `http://host:port`.
    pub endpoint: String,
    /// For the server's logs.
    pub name: String,
    /// Longest wait for a connection and its session.
    pub connect_timeout: Duration,
    /// Longest wait for a lookup; after it every block is a miss.
    pub lookup_timeout: Duration,
    /// Longest wait for the bytes of one fetch; after it what has not arrived is a miss.
    pub fetch_timeout: Duration,
    /// Longest wait for one publish; after it what is not acknowledged counts as not stored.
    pub publish_timeout: Duration,
    /// How long found blocks stay readable.
    pub lease_ttl: Duration,
}

impl ClientOptions {
    /// Defaults for a server at `endpoint`.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            name: "cairn-client".into(),
            connect_timeout: Duration::from_secs(2),
            lookup_timeout: Duration::from_secs(1),
            fetch_timeout: Duration::from_secs(10),
            publish_timeout: Duration::from_secs(10),
            lease_ttl: Duration::from_secs(30),
        }
    }
}
