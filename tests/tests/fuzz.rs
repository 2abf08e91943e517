//! The bodies of the fuzz targets (`fuzz/`) on random bytes and on damaged messages: a smoke test; `cargo fuzz` goes on from here.

#![allow(clippy::unwrap_used)]

use cairn_proto::{Dtype, KeySpace, Layout, SpaceParts, pb};
use cairn_tests::fuzz;
use proptest::prelude::*;
use prost::Message;

fn real_message(n: u32) -> Vec<u8> {
    let layout = Layout::new(1 + n % 8, 1 + n % 3, 64, 16).unwrap();
    let space = KeySpace::new(SpaceParts::new("t", [n as u8; 32], Dtype::Bf16, layout)).unwrap();
    pb::OpenSpaceRequest { session_id: u64::from(n), space: Some(pb::KeySpace::from(&space)) }.encode_to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn recovery_accepts_nothing_that_was_not_written(data in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz::recovery(&data);
    }

    #[test]
    fn messages_are_parsed_or_refused(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        fuzz::messages(&data);
    }

    #[test]
    fn damaged_messages_are_parsed_or_refused(n in any::<u32>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut message = real_message(n);
        fuzz::messages(&message);
        let at = at.index(message.len());
        message[at] = byte;
        fuzz::messages(&message);
    }
}
