//! A lookup and the fetch of what it finds as one: a round trip less where the server can send blocks unasked.

use crate::client::CacheClient;
use crate::connection::Connection;
use crate::fetch::{Fetched, bring, outcomes, patience, promise, whole};
use crate::lookup::Lookup;
use cairn_proto::{BlockHash, KeySpace, MissReason, limits, pb};
use cairn_transfer::{Arrivals, Reader, WireKind};
use tokio::time::Instant;
use tonic::Status;

impl CacheClient {
    /// Finds and leases the longest resident run of `hashes`, as [`CacheClient::lookup`], and reads its blocks from position `first` on
    /// into `targets`, as [`CacheClient::fetch`]: as many as there are, and targets for. The outcomes are those of the blocks that were
    /// found; of a shorter run, the last targets stay as they are. Over QUIC and TLS this takes one round trip, where a lookup and a
    /// fetch take two; elsewhere it is the same as both.
    ///
    /// # Panics
    /// When a target has not the size of a block.
    pub async fn read<T: AsMut<[u8]>>(
        &self,
        space: &KeySpace,
        hashes: &[BlockHash],
        first: usize,
        targets: &mut [T],
    ) -> (Lookup, Fetched) {
        let short = hashes.len() <= limits::MAX_BLOCKS_PER_REQUEST;
        if short
            && !targets.is_empty()
            && let Ok((connection, until)) = self.connection_for(space, self.options().lookup_timeout).await
            && let Some(wire) = connection.wires.order().first()
            && let Some(reader) = wire.reader()
            && let over = (wire.kind(), reader)
            && let Some(read) =
                self.read_over(&connection, over, (space, hashes), (first, &mut *targets), until).await
        {
            return read;
        }
        let lookup = self.lookup(space, hashes).await;
        let fetched = match &lookup.run {
            Some(run) if run.len() > first => {
                let count = targets.len().min(run.len() - first);
                self.fetch(run, first, &mut targets[..count]).await
            }
            _ => Fetched::missed(0, MissReason::NeverStored),
        };
        (lookup, fetched)
    }

    /// `None` when the wire failed before it answered.
    async fn read_over<T: AsMut<[u8]>>(
        &self,
        connection: &Connection,
        (wire, reader): (WireKind, &dyn Reader),
        (space, hashes): (&KeySpace, &[BlockHash]),
        (first, targets): (usize, &mut [T]),
        until: Instant,
    ) -> Option<(Lookup, Fetched)> {
        let asked = Instant::now();
        let (first_block, count) = (u32::try_from(first).ok()?, u32::try_from(targets.len()).ok()?);
        let question = self.question(connection, space, hashes);
        let request = pb::ReadRequest { lookup: Some(question.clone()), first: first_block, count };
        let answer = connection.wires.ask(wire, reader.read(&request), until).await;
        let (answer, following) = match answer {
            Ok(Some(found)) => found,
            Ok(None) => {
                self.unanswered(connection, &question, &Status::unavailable("the wire failed"));
                return None;
            }
            Err(status) => {
                let missed = self.unanswered(connection, &question, &status);
                let lookup = Lookup::missed(hashes.len(), missed);
                return Some((lookup, Fetched::missed(0, missed)));
            }
        };
        let lookup = match self.found(connection, (space, hashes), &answer, asked) {
            Ok(lookup) => lookup,
            Err(missed) => {
                return Some((Lookup::missed(hashes.len(), missed), Fetched::missed(0, missed)));
            }
        };
        let run = lookup.run.as_ref().filter(|run| run.len() > first);
        let Some((run, following)) = run.zip(following) else {
            return Some((lookup, Fetched::missed(0, MissReason::NeverStored)));
        };
        let count = targets.len().min(run.len() - first);
        let targets: Vec<&mut [u8]> = targets[..count].iter_mut().map(AsMut::as_mut).collect();
        let right = targets.iter().all(|target| target.len() as u64 == space.block_bytes());
        assert!(right, "a target must have the size of a block");
        let mut arrivals = Arrivals::new(promise(run), first, targets);
        let deadline = self.fetch_deadline();
        // A wire that is the only one may take all the time.
        let until = patience(deadline, connection.wires.order().len() == 1);
        let come = connection.wires.ask_until(wire, following.receive(&mut arrivals), until).await;
        let bytes = whole(&arrivals) * space.block_bytes();
        connection.wires.came(wire, bytes);
        if matches!(come, Ok(Some(()))) && arrivals.undecided().is_none() {
            connection.wires.worked(wire, bytes);
            let outcomes = outcomes(connection, run, first, &arrivals, MissReason::PeerDown);
            return Some((lookup, Fetched { outcomes, wire: Some(wire) }));
        }
        // What did not come is asked for once more, over whatever works.
        let (last, missing) = bring(connection, run, 0, &mut arrivals, deadline).await;
        let outcomes = outcomes(connection, run, first, &arrivals, missing);
        Some((lookup, Fetched { outcomes, wire: last.or(Some(wire)) }))
    }
}
