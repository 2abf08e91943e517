//! Prefill on another worker: the client that a decode worker has, and the service that a prefill worker offers.

use crate::engine::{Engine, Request, Update, Work};
use crate::sampling::Sampling;
use cairn_proto::{KeySpace, SpaceId, limits, pb};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// A peer that does not answer this long after a ping is gone.
const KEEPALIVE: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a peer that failed is left alone.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(3);

/// Asks another worker to prefill.
#[derive(Clone)]
pub struct PrefillPeer {
    grpc: pb::prefill_client::PrefillClient<Channel>,
    timeout: Duration,
    /// After a failure the peer is left alone until then.
    rest_until: Arc<Mutex<Option<Instant>>>,
}

impl PrefillPeer {
    /// A peer at `http://host:port`; connected to when first needed. After `timeout` the caller computes by itself.
    ///
    /// # Errors
    /// When the endpoint is not valid.
    pub fn new(endpoint: &str, timeout: Duration) -> Result<Self, String> {
        let parsed = Endpoint::from_shared(endpoint.to_owned());
        let parsed =
            parsed.map_err(|_| format!("{endpoint:?} is not an endpoint: write http://host:port"))?;
        let channel = parsed
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .tcp_nodelay(true)
            .connect_lazy();
        let grpc = pb::prefill_client::PrefillClient::new(channel)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        Ok(Self { grpc, timeout, rest_until: Arc::default() })
    }

    /// Says whether the peer did it. A peer that failed is not asked again for a while: requests must not queue up behind
    /// one that hangs.
    pub(crate) async fn prefill(&self, space: &KeySpace, tokens: &[u32]) -> bool {
        if self.resting() {
            return false;
        }
        let helped = self.ask(space, tokens).await;
        if !helped {
            *self.rest() = Some(Instant::now() + REST_AFTER_FAILURE);
        }
        helped
    }

    fn resting(&self) -> bool {
        self.rest().is_some_and(|until| Instant::now() < until)
    }

    /// The value is replaced whole, so a panic elsewhere cannot have left half of it.
    fn rest(&self) -> MutexGuard<'_, Option<Instant>> {
        self.rest_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, space: &KeySpace, tokens: &[u32]) -> bool {
        let request =
            pb::PrefillRequest { space_id: space.id().0.to_vec().into(), token_ids: tokens.to_vec() };
        let mut grpc = self.grpc.clone();
        match tokio::time::timeout(self.timeout, grpc.prefill(request)).await {
            Ok(Ok(answer)) => answer.get_ref().stored_blocks > 0,
            Ok(Err(status)) => {
                tracing::info!(error = status.message(), "the prefill worker did not help; computing here");
                false
            }
            Err(_) => {
                tracing::info!("the prefill worker did not answer in time; computing here");
                false
            }
        }
    }
}

/// The service of a prefill worker.
pub(crate) struct PrefillService {
    pub(crate) engine: Engine,
    pub(crate) space: SpaceId,
}

#[tonic::async_trait]
impl pb::prefill_server::Prefill for PrefillService {
    async fn prefill(
        &self,
        request: tonic::Request<pb::PrefillRequest>,
    ) -> Result<Response<pb::PrefillResponse>, Status> {
        let request = request.into_inner();
        if SpaceId::try_from(request.space_id.as_ref())? != self.space {
            return Err(Status::failed_precondition(
                "the workers' key spaces differ: same model file, KV dtype, block size and tenant on both?",
            ));
        }
        let work = Request {
            tokens: request.token_ids,
            work: Work::Prefill,
            sampling: Sampling { temperature: 0.0, top_p: 1.0, seed: 0 },
            use_cache: true,
        };
        let started = Instant::now();
        let submitted = self.engine.submit(work).await;
        let mut updates = submitted.map_err(|error| Status::resource_exhausted(error.to_string()))?;
        while let Some(update) = updates.recv().await {
            if let Update::Finished(summary) = update {
                return Ok(Response::new(pb::PrefillResponse {
                    stored_blocks: summary.stored_blocks as u32,
                    computed_blocks: summary.computed_blocks as u32,
                    compute_ms: started.elapsed().as_secs_f64() * 1e3,
                }));
            }
        }
        Err(Status::aborted("the engine ended"))
    }
}
