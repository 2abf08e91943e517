//! What the fuzz targets run, and the tests with random bytes: parsers that see what they were not meant to see. They must not panic, and
//! must not accept what nobody wrote.

use cairn_core::{PAGE_BYTES, Record};
use cairn_proto::{BlockHash, Checksum, KeySpace, SpaceId, pb, wire};
use cairn_server::nvme::format::{DeviceKey, FormatError, Header, Position, Seal};
use prost::Message;

const KEY: DeviceKey = DeviceKey([0x5a; 32]);

/// Segments, records, summaries and tombstones of a device.
pub fn recovery(data: &[u8]) {
    let mut page = vec![0u8; PAGE_BYTES as usize];
    let len = data.len().min(page.len());
    page[..len].copy_from_slice(&data[..len]);
    let position = Position { segment: 1, generation: 2, page: 3 };
    let forged = |result: Result<(), FormatError>| assert!(result.is_err(), "accepted what nobody wrote");
    forged(KEY.read_record(&page, position).map(|_| ()));
    forged(KEY.read_segment(&page, 1).map(|_| ()));
    forged(KEY.read_trailer(&page, (1, 2)).map(|_| ()));
    assert!(KEY.read_tombstones(data).is_empty(), "accepted what nobody wrote");
    // The right hash over the wrong entries: a damaged trailer cannot say so, but a defect could.
    let _ =
        KEY.read_entries(&page, (u32::from(data.first().copied().unwrap_or(0)), blake3::hash(&page)), (1, 2));
    if data.len() >= 200 {
        written_and_damaged(data, position);
    }
}

/// A header made of these bytes reads back; with one of its bits flipped it does not.
fn written_and_damaged(data: &[u8], position: Position) {
    let array = |at: usize| <[u8; 32]>::try_from(&data[at..at + 32]).expect("32 bytes");
    let half = |at: usize| <[u8; 16]>::try_from(&data[at..at + 16]).expect("16 bytes");
    let tenant: String =
        data[160..192].iter().take(usize::from(data[1]) % 32).map(|byte| char::from(byte % 128)).collect();
    let record = Record {
        space: SpaceId(array(0)),
        tenant: tenant.as_str().into(),
        block_bytes: u64::from(data[2]) << 12,
        hash: BlockHash(array(32)),
        parent: data[3].is_multiple_of(2).then(|| BlockHash(array(64))),
        checksum: Checksum(half(96)),
        depth: u16::from(data[4]),
        sequence: u64::from(data[5]),
    };
    let seal =
        Seal { epoch: u32::from(data[6]), salt: half(144), payload_tag: half(112), checksum_tag: half(128) };
    let header = Header { record, seal: data[7].is_multiple_of(2).then_some(seal) };
    let mut page = vec![0u8; PAGE_BYTES as usize];
    KEY.write_record(&mut page, &header, position);
    assert_eq!(KEY.read_record(&page, position), Ok(header.clone()));
    let summary = KEY.write_summary(&[(3, header.clone())], (1, 2));
    let (entries, trailer) = summary.split_at(summary.len() - PAGE_BYTES as usize);
    let found = KEY.read_trailer(trailer, (1, 2)).expect("a trailer");
    assert_eq!(KEY.read_entries(entries, found, (1, 2)), Ok(vec![(3, header)]));
    let bit = (usize::from(data[8]) << 8 | usize::from(data[9])) % (496 * 8);
    page[bit / 8] ^= 1 << (bit % 8);
    assert!(KEY.read_record(&page, position).is_err(), "bit {bit} makes no difference");
}

/// Messages of the API, and what lives inside them.
pub fn messages(data: &[u8]) {
    if let Ok(message) = pb::OpenSpaceRequest::decode(data)
        && let Some(space) = &message.space
        && let Ok(space) = KeySpace::try_from(space)
    {
        // What is accepted has an id, and says the same again.
        let again = KeySpace::try_from(&pb::KeySpace::from(&space)).expect("its own encoding");
        assert_eq!(again.id(), space.id());
    }
    if let Ok(message) = pb::LookupRequest::decode(data) {
        let _ = BlockHash::parse_list(&message.block_hashes);
        let _ = SpaceId::try_from(message.space_id.as_ref());
    }
    if let Ok(message) = pb::LookupResponse::decode(data) {
        for asked in [0, 1, 7] {
            if let Ok(outcomes) = wire::parse_outcomes(&message.outcomes, asked) {
                assert_eq!(outcomes.len(), asked);
            }
            let _ = Checksum::parse_list(&message.checksums, asked);
        }
    }
    if let Ok(message) = pb::ReserveRequest::decode(data) {
        let _ = wire::parse_parent(&message.parent_hash);
    }
    let _ = pb::PublishChunk::decode(data);
    let _ = pb::FetchChunk::decode(data);
    let _ = pb::StatsResponse::decode(data);
}
