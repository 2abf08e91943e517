//! A stored block goes bad in the server's memory: found at its next use, quarantined, explained, and replaceable. Alone in
//! its file, because it looks for the arena in the memory of its process.

#![allow(clippy::unwrap_used)]

use cairn_client::Stored;
use cairn_proto::{MissReason, Outcome, pb};
use cairn_tests::*;

/// A large view, which several threads verify, is right up to the first block that is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_view_ends_before_what_is_wrong() {
    let (server, client) = server_and_client(config(160)).await;
    let space = space("u");
    let chain = hashes(&space, 4, 150);
    client.publish(&space, None, &blocks(&space, &chain)).await;
    for (quarantined, wrong) in (0..).zip([None, Some(149), Some(100), Some(99), Some(0)]) {
        wrong.iter().for_each(|wrong| corrupt_in_memory(&payload(&space, &chain[*wrong])));
        let run = client.lookup(&space, &chain).await.run.unwrap();
        let view = client.fetch_view(&run, 0, run.len()).await;
        let right = wrong.unwrap_or(chain.len());
        assert_eq!(view.verify_all(), right, "{wrong:?} is wrong");
        for (i, hash) in chain[..right].iter().enumerate() {
            assert!(view.block(i).unwrap() == payload(&space, hash), "block {i}");
        }
        if let Some(wrong) = wrong {
            assert_eq!(view.block(wrong).err(), Some(Outcome::Corrupt));
            drop((view, run));
            eventually("it is quarantined", || server.counters().quarantined_blocks == quarantined).await;
        }
    }
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_went_bad_is_never_used_and_leaves() {
    let (server, client) = server_and_client(config(16)).await;
    let space = space("t");
    let chain = hashes(&space, 3, 6);
    client.publish(&space, None, &blocks(&space, &chain)).await;
    corrupt_in_memory(&payload(&space, &chain[2]));
    let run = client.lookup(&space, &chain).await.run.unwrap();
    let mut targets = vec![vec![0u8; space.block_bytes() as usize]; 6];
    let outcomes = client.fetch(&run, 0, &mut targets).await;
    for (i, outcome) in outcomes.iter().enumerate() {
        assert_eq!(*outcome == Outcome::Corrupt, i == 2, "{outcomes:?}");
    }
    eventually("the block is quarantined", || server.counters().quarantined_blocks == 1).await;
    drop(run);
    let outcomes = client.lookup(&space, &chain).await.outcomes;
    assert_eq!(outcomes[2], Outcome::Miss(MissReason::Quarantined));
    let explained = client.explain(space.id(), &chain[2..4]).await.unwrap();
    let Some(pb::block_explanation::State::Absent(absent)) = &explained[0].state else {
        panic!("{explained:?}")
    };
    assert_eq!(absent.reason(), pb::MissReason::Quarantined);
    let Some(pb::block_explanation::State::Resident(child)) = &explained[1].state else {
        panic!("{explained:?}")
    };
    assert!(!child.reachable);
    let again = client.publish(&space, Some(chain[1]), &blocks(&space, &chain[2..3])).await;
    assert_eq!(again, vec![Stored::Committed]);
    assert_eq!(fetch_verified(&client, &space, &chain).await, 6);
    // Several at once, counted: injected = detected.
    let injected = [0, 1, 3, 4, 5];
    injected.iter().for_each(|i| corrupt_in_memory(&payload(&space, &chain[*i])));
    let run = client.lookup(&space, &chain).await.run.unwrap();
    let outcomes = client.fetch(&run, 0, &mut targets).await;
    let detected = outcomes.iter().filter(|outcome| **outcome == Outcome::Corrupt).count();
    assert_eq!(detected, injected.len(), "{outcomes:?}");
    let all = 1 + injected.len() as u64;
    eventually("all of them are quarantined", || server.counters().quarantined_blocks == all).await;
    drop(run);
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}
