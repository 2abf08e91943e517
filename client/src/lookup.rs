//! Asking for the longest resident run of a chain.

use crate::client::{CacheClient, reason, until};
use crate::connection::Connection;
use crate::lease::Lease;
use cairn_proto::{BlockHash, Checksum, KeySpace, MissReason, Outcome, Tier, limits, pb, wire};
use cairn_transfer::WireKind;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;

/// The answer to a lookup.
#[derive(Debug)]
pub struct Lookup {
    /// One for each block asked for.
    pub outcomes: Vec<Outcome>,
    /// The resident run, if there is any.
    pub run: Option<Run>,
}

impl Lookup {
    /// Blocks from the start of the chain that can be fetched.
    pub fn resident(&self) -> usize {
        self.run.as_ref().map_or(0, Run::len)
    }

    pub(crate) fn missed(count: usize, reason: MissReason) -> Self {
        Self { outcomes: vec![Outcome::Miss(reason); count], run: None }
    }
}

/// Leased blocks from the start of a chain. Dropping it releases the lease.
#[derive(Debug)]
pub struct Run {
    /// Shared with reports of corrupt blocks, which must arrive before the release.
    pub(crate) lease: Arc<Lease>,
    pub(crate) space: KeySpace,
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) checksums: Vec<Checksum>,
    /// Where each block was found.
    pub(crate) tiers: Vec<Tier>,
    /// Where each is in shared memory, if the lookup went that way.
    pub(crate) locations: Arc<[u64]>,
}

impl Run {
    /// Blocks of the run; at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// The lease that keeps them.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }
}

impl CacheClient {
    /// Finds and leases the longest resident run of `hashes`, which must start at the first block of the prompt. Of
    /// chains longer than [`limits::MAX_BLOCKS_PER_REQUEST`] only that many blocks are asked for; the rest is `Busy`.
    pub async fn lookup(&self, space: &KeySpace, hashes: &[BlockHash]) -> Lookup {
        let asked = &hashes[..hashes.len().min(limits::MAX_BLOCKS_PER_REQUEST)];
        let mut lookup = match self.try_lookup(space, asked).await {
            Ok(lookup) => lookup,
            Err(reason) => Lookup::missed(asked.len(), reason),
        };
        lookup.outcomes.resize(hashes.len(), Outcome::Busy);
        lookup
    }

    async fn try_lookup(&self, space: &KeySpace, hashes: &[BlockHash]) -> Result<Lookup, MissReason> {
        let (connection, deadline) = self.connection_for(space, self.options().lookup_timeout).await?;
        let asked = Instant::now();
        let request = self.question(&connection, space, hashes);
        let told = request.clone();
        let answer = ask(&connection, request, deadline).await;
        let answer = answer.map_err(|status| self.unanswered(&connection, &told, &status))?;
        self.found(&connection, (space, hashes), &answer, asked)
    }

    /// The request for a lookup, with what the server should hear of at the next opportunity.
    pub(crate) fn question(
        &self,
        connection: &Connection,
        space: &KeySpace,
        hashes: &[BlockHash],
    ) -> pb::LookupRequest {
        let (copied_bytes, rdma_bytes) = connection.wires.take_unheard();
        pb::LookupRequest {
            session_id: connection.session,
            space_id: space.id().0.to_vec().into(),
            block_hashes: BlockHash::concat(hashes),
            lease_ttl_ms: u32::try_from(self.options().lease_ttl.as_millis()).unwrap_or(u32::MAX),
            release_lease_ids: self.releases().take(connection.session),
            copied_bytes,
            rdma_bytes,
        }
    }

    /// Why there is no answer to a request; keeps what the server was to hear.
    pub(crate) fn unanswered(
        &self,
        connection: &Connection,
        request: &pb::LookupRequest,
        status: &Status,
    ) -> MissReason {
        // To release a lease twice does no harm.
        self.releases().put_back(connection.session, request.release_lease_ids.clone());
        connection.wires.came(WireKind::Shm, request.copied_bytes);
        connection.wires.came(WireKind::Rdma, request.rdma_bytes);
        match status.code() {
            tonic::Code::NotFound => MissReason::PeerDown,
            _ => reason(status),
        }
    }

    /// What an answer says.
    pub(crate) fn found(
        &self,
        connection: &Connection,
        (space, hashes): (&KeySpace, &[BlockHash]),
        answer: &pb::LookupResponse,
        asked: Instant,
    ) -> Result<Lookup, MissReason> {
        let lease = (answer.lease_id != 0).then(|| {
            let ttl = Duration::from_millis(u64::from(answer.lease_ttl_ms));
            Lease::new(connection.session, answer.lease_id, (asked, ttl), self.releases())
        });
        parse(space, hashes, answer, lease).map_err(|status| {
            tracing::warn!(error = status.message(), "the cache server's answer makes no sense");
            MissReason::PeerDown
        })
    }
}

/// Over the best wire if it can, else as a call.
async fn ask(
    connection: &Connection,
    request: pb::LookupRequest,
    deadline: Instant,
) -> Result<pb::LookupResponse, Status> {
    if let Some(wire) = connection.wires.order().first()
        && let Some(answer) = wire.lookup(&request)
        && let Some(answer) = connection.wires.ask(wire.kind(), answer, deadline).await?
    {
        return Ok(answer);
    }
    until(deadline, connection.grpc.clone().lookup(request)).await
}

fn parse(
    space: &KeySpace,
    hashes: &[BlockHash],
    answer: &pb::LookupResponse,
    lease: Option<Lease>,
) -> Result<Lookup, Status> {
    let outcomes = wire::parse_outcomes(&answer.outcomes, hashes.len())?;
    let Some(lease) = lease else {
        return Ok(Lookup { outcomes, run: None });
    };
    let hits = outcomes.iter().take_while(|outcome| outcome.is_hit()).count();
    let checksums = Checksum::parse_list(&answer.checksums, hits)?;
    if hits == 0 {
        return Err(Status::internal("a lease on nothing"));
    }
    let lease = Arc::new(lease);
    let tier = |outcome: &Outcome| match outcome {
        Outcome::Hit(tier) => *tier,
        _ => Tier::Host,
    };
    let tiers = outcomes[..hits].iter().map(tier).collect();
    let locations: Arc<[u64]> = answer.locations.as_slice().into();
    if locations.len() > hits {
        return Err(Status::internal("places of blocks that are not leased"));
    }
    let run =
        Run { lease, space: space.clone(), hashes: hashes[..hits].to_vec(), checksums, tiers, locations };
    Ok(Lookup { outcomes, run: Some(run) })
}
