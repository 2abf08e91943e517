//! Bytes on a device: the layout of segments, records and summaries, and what makes one of them valid. No IO.
//!
//! A segment file is a header page, records, and, once it is full, a summary at its end:
//!
//! ```text
//! page 0           segment header: device, number and generation of the segment
//! page 1 …         records: a header page, then the payload, padded to whole pages
//! last pages       summary: one entry for each wanted record, then a trailer page
//! ```
//!
//! All integers are little endian. Every header, the trailer and each summary entry end in a keyed BLAKE3 over what is before
//! it *and where it is*, with a key that only this device has. So a page that a client sends as payload cannot pass for a
//! header, nor can a header that was copied from elsewhere, and what an earlier generation of the segment left behind is
//! recognised as old.

use cairn_core::{PAGE_BYTES, Record, SUMMARY_RECORD_BYTES};
use cairn_proto::{BlockHash, Checksum, SpaceId, limits::MAX_NAME_BYTES};
use thiserror::Error;

/// Version of everything that this file describes.
pub const FORMAT_VERSION: u32 = 1;

const RECORD_MAGIC: [u8; 8] = *b"CAIRNREC";
const SEGMENT_MAGIC: [u8; 8] = *b"CAIRNSEG";
const SUMMARY_MAGIC: [u8; 8] = *b"CAIRNSUM";

const MAC_BYTES: usize = 32;
/// Bytes of a record header that mean something; the rest of its page is zero.
const RECORD_BYTES: usize = 496;
const SEGMENT_BYTES: usize = 96;
const TRAILER_BYTES: usize = 128;

/// Bytes that make the keys of one start of a device its own.
pub const SALT_BYTES: usize = 16;

/// Bytes that authenticate one encrypted text.
pub const TAG_BYTES: usize = 16;

/// The secret that makes headers of one device valid.
#[derive(Clone)]
pub struct DeviceKey(pub [u8; 32]);

/// Where a header claims to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Segment, counted on the device.
    pub segment: u32,
    /// Its generation.
    pub generation: u64,
    /// First page of what is described.
    pub page: u32,
}

/// What encryption adds to a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Which start of the device made the nonces, which never repeat within one.
    pub epoch: u32,
    /// Of that start.
    pub salt: [u8; SALT_BYTES],
    /// Of the payload.
    pub payload_tag: [u8; TAG_BYTES],
    /// Of the checksum, which is encrypted too: it would tell a guesser that the guess is right.
    pub checksum_tag: [u8; TAG_BYTES],
}

/// A record header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it says. The checksum is encrypted if `seal` is present.
    pub record: Record,
    /// Present when the payload is encrypted.
    pub seal: Option<Seal>,
}

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FormatError {
    /// Nothing of this kind was ever written here.
    #[error("no {0} here")]
    Absent(&'static str),
    /// Written by another release.
    #[error("{what} has format version {found}; this release reads version {FORMAT_VERSION} only")]
    Version {
        /// Of what.
        what: &'static str,
        /// The version found.
        found: u32,
    },
    /// Torn, corrupted, copied from elsewhere or left over from an earlier generation.
    #[error("a {0} that is not valid here")]
    Invalid(&'static str),
}

/// Fields one after the other.
struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn put(&mut self, field: &[u8]) {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

impl DeviceKey {
    fn mac(&self, bytes: &[u8], position: Position) -> [u8; MAC_BYTES] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(bytes);
        hasher.update(&position.segment.to_le_bytes());
        hasher.update(&position.generation.to_le_bytes());
        hasher.update(&position.page.to_le_bytes());
        *hasher.finalize().as_bytes()
    }

    /// Puts the code into the last [`MAC_BYTES`].
    fn sign(&self, bytes: &mut [u8], position: Position) {
        let split = bytes.len() - MAC_BYTES;
        let mac = self.mac(&bytes[..split], position);
        bytes[split..].copy_from_slice(&mac);
    }

    fn check(&self, bytes: &[u8], position: Position) -> bool {
        let (text, mac) = bytes.split_at(bytes.len() - MAC_BYTES);
        // `blake3::Hash` compares in constant time.
        blake3::Hash::from_bytes(self.mac(text, position)) == *mac
    }

    fn open<'a>(
        &self,
        what: &'static str,
        magic: [u8; 8],
        (bytes, position): (&'a [u8], Position),
    ) -> Result<Reader<'a>, FormatError> {
        let mut reader = Reader { bytes, at: 0 };
        if reader.take() != magic {
            return Err(FormatError::Absent(what));
        }
        let found = reader.u32();
        if !self.check(bytes, position) {
            return Err(FormatError::Invalid(what));
        }
        if found != FORMAT_VERSION {
            return Err(FormatError::Version { what, found });
        }
        Ok(reader)
    }

    /// Writes a record header to the start of `page`.
    pub fn write_record(&self, page: &mut [u8], header: &Header, position: Position) {
        let Header { record, seal } = header;
        let bytes = &mut page[..RECORD_BYTES];
        bytes.fill(0);
        let mut writer = Writer { bytes, at: 0 };
        writer.put(&RECORD_MAGIC);
        writer.put(&FORMAT_VERSION.to_le_bytes());
        writer.put(&seal.map_or(0, |seal| seal.epoch).to_le_bytes());
        writer.put(&position.generation.to_le_bytes());
        writer.put(&record.sequence.to_le_bytes());
        writer.put(&record.block_bytes.to_le_bytes());
        writer.put(&record.space.0);
        writer.put(&record.hash.0);
        writer.put(&record.parent.unwrap_or(BlockHash([0; 32])).0);
        writer.put(&record.checksum.0);
        writer.put(&seal.map_or([0; TAG_BYTES], |seal| seal.payload_tag));
        writer.put(&seal.map_or([0; TAG_BYTES], |seal| seal.checksum_tag));
        writer.put(&seal.map_or([0; SALT_BYTES], |seal| seal.salt));
        writer.put(&[u8::from(record.parent.is_some()), u8::from(seal.is_some())]);
        writer.put(&record.depth.to_le_bytes());
        writer.put(&(record.tenant.len() as u16).to_le_bytes());
        writer.put(record.tenant.as_bytes());
        self.sign(bytes, position);
    }

    /// Reads a record header.
    ///
    /// # Errors
    /// When there is none that is valid at this position.
    pub fn read_record(&self, page: &[u8], position: Position) -> Result<Header, FormatError> {
        const WHAT: &str = "record header";
        let bytes = page.get(..RECORD_BYTES).ok_or(FormatError::Absent(WHAT))?;
        let mut reader = self.open(WHAT, RECORD_MAGIC, (bytes, position))?;
        let epoch = reader.u32();
        let generation = reader.u64();
        let sequence = reader.u64();
        let block_bytes = reader.u64();
        let space = SpaceId(reader.take());
        let hash = BlockHash(reader.take());
        let parent = BlockHash(reader.take());
        let checksum = Checksum(reader.take());
        let (payload_tag, checksum_tag, salt) = (reader.take(), reader.take(), reader.take());
        let seal = Seal { epoch, salt, payload_tag, checksum_tag };
        let [has_parent, sealed] = reader.take();
        let depth = u16::from_le_bytes(reader.take());
        let tenant_len = usize::from(u16::from_le_bytes(reader.take()));
        let tenant = bytes.get(reader.at..reader.at + tenant_len).filter(|_| tenant_len <= MAX_NAME_BYTES);
        let tenant = tenant.and_then(|name| std::str::from_utf8(name).ok());
        let tenant =
            tenant.filter(|_| generation == position.generation).ok_or(FormatError::Invalid(WHAT))?;
        let parent = (has_parent == 1).then_some(parent);
        let tenant = tenant.into();
        let record = Record { space, tenant, block_bytes, hash, parent, checksum, depth, sequence };
        Ok(Header { record, seal: (sealed == 1).then_some(seal) })
    }

    /// Writes a segment header to the start of `page`.
    pub fn write_segment(&self, page: &mut [u8], position: Position) {
        let bytes = &mut page[..SEGMENT_BYTES];
        bytes.fill(0);
        let mut writer = Writer { bytes, at: 0 };
        writer.put(&SEGMENT_MAGIC);
        writer.put(&FORMAT_VERSION.to_le_bytes());
        writer.put(&position.segment.to_le_bytes());
        writer.put(&position.generation.to_le_bytes());
        self.sign(bytes, Position { generation: 0, ..position });
    }

    /// Reads the generation from a segment's header.
    ///
    /// # Errors
    /// When there is none that is valid here.
    pub fn read_segment(&self, page: &[u8], segment: u32) -> Result<u64, FormatError> {
        const WHAT: &str = "segment header";
        let bytes = page.get(..SEGMENT_BYTES).ok_or(FormatError::Absent(WHAT))?;
        let position = Position { segment, generation: 0, page: 0 };
        let mut reader = self.open(WHAT, SEGMENT_MAGIC, (bytes, position))?;
        let _segment = reader.u32();
        Ok(reader.u64())
    }

    /// A segment's summary: entries and trailer, in whole pages, to be written to its end.
    pub fn write_summary(&self, headers: &[(u32, Header)], (segment, generation): (u32, u64)) -> Vec<u8> {
        let entry_bytes = SUMMARY_RECORD_BYTES as usize;
        let pages = cairn_core::summary_pages(headers.len()) as usize;
        let page_bytes = PAGE_BYTES as usize;
        let mut bytes = vec![0; pages * page_bytes];
        for (entry, (page, header)) in bytes.chunks_mut(entry_bytes).zip(headers) {
            self.write_record(entry, header, Position { segment, generation, page: *page });
            entry[RECORD_BYTES..RECORD_BYTES + 4].copy_from_slice(&page.to_le_bytes());
        }
        let (entries, trailer) = bytes.split_at_mut((pages - 1) * page_bytes);
        let trailer = &mut trailer[..TRAILER_BYTES];
        let mut writer = Writer { bytes: trailer, at: 0 };
        writer.put(&SUMMARY_MAGIC);
        writer.put(&FORMAT_VERSION.to_le_bytes());
        writer.put(&(headers.len() as u32).to_le_bytes());
        writer.put(blake3::hash(entries).as_bytes());
        self.sign(trailer, Position { segment, generation, page: u32::MAX });
        bytes
    }

    /// Reads a trailer: how many entries are before it, and the hash of their pages.
    ///
    /// # Errors
    /// When there is none that is valid for this generation.
    pub fn read_trailer(
        &self,
        page: &[u8],
        (segment, generation): (u32, u64),
    ) -> Result<(u32, blake3::Hash), FormatError> {
        const WHAT: &str = "segment summary";
        let bytes = page.get(..TRAILER_BYTES).ok_or(FormatError::Absent(WHAT))?;
        let position = Position { segment, generation, page: u32::MAX };
        let mut reader = self.open(WHAT, SUMMARY_MAGIC, (bytes, position))?;
        let count = reader.u32();
        Ok((count, blake3::Hash::from_bytes(reader.take())))
    }

    /// Reads the entries of a summary whose trailer was valid.
    ///
    /// # Errors
    /// When they are not those that the trailer was written for.
    pub fn read_entries(
        &self,
        bytes: &[u8],
        (count, hash): (u32, blake3::Hash),
        (segment, generation): (u32, u64),
    ) -> Result<Vec<(u32, Header)>, FormatError> {
        if blake3::hash(bytes) != hash {
            return Err(FormatError::Invalid("segment summary"));
        }
        let entries = bytes.chunks(SUMMARY_RECORD_BYTES as usize).take(count as usize);
        let read = |entry: &[u8]| {
            let mut reader = Reader { bytes: entry, at: RECORD_BYTES };
            let page = reader.u32();
            Ok((page, self.read_record(entry, Position { segment, generation, page })?))
        };
        entries.map(read).collect()
    }

    /// One line of the list of spaces that were emptied by an administrator: their records up to a number are dead.
    pub fn write_tombstone(&self, space: &SpaceId, sequence: u64) -> [u8; TOMBSTONE_BYTES] {
        let mut bytes = [0; TOMBSTONE_BYTES];
        let mut writer = Writer { bytes: &mut bytes, at: 0 };
        writer.put(&space.0);
        writer.put(&sequence.to_le_bytes());
        self.sign(&mut bytes, TOMBSTONE_POSITION);
        bytes
    }

    /// The valid lines of that list.
    pub fn read_tombstones(&self, bytes: &[u8]) -> Vec<(SpaceId, u64)> {
        let lines = bytes.chunks_exact(TOMBSTONE_BYTES).filter(|line| self.check(line, TOMBSTONE_POSITION));
        let read = |line: &[u8]| {
            let mut reader = Reader { bytes: line, at: 0 };
            (SpaceId(reader.take()), reader.u64())
        };
        lines.map(read).collect()
    }
}

/// Bytes of one tombstone.
pub const TOMBSTONE_BYTES: usize = 72;
const TOMBSTONE_POSITION: Position = Position { segment: u32::MAX, generation: u64::MAX, page: u32::MAX };

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> DeviceKey {
        DeviceKey([n; 32])
    }

    fn header(n: u8) -> Header {
        let record = Record {
            space: SpaceId([n; 32]),
            tenant: "a tenant".into(),
            block_bytes: 12_345,
            hash: BlockHash([n.wrapping_add(1); 32]),
            parent: n.is_multiple_of(2).then_some(BlockHash([0; 32])),
            checksum: Checksum([n; 16]),
            depth: 77,
            sequence: 99,
        };
        let seal = Seal { epoch: 5, salt: [n; 16], payload_tag: [n; 16], checksum_tag: [n; 16] };
        Header { record, seal: n.is_multiple_of(3).then_some(seal) }
    }

    const HERE: Position = Position { segment: 3, generation: 8, page: 17 };

    #[test]
    fn a_header_reads_back_and_any_flipped_bit_or_other_place_is_noticed() {
        let mut page = vec![0u8; PAGE_BYTES as usize];
        for n in 0..6 {
            key(1).write_record(&mut page, &header(n), HERE);
            assert_eq!(key(1).read_record(&page, HERE), Ok(header(n)));
        }
        for elsewhere in [
            Position { segment: 4, ..HERE },
            Position { generation: 9, ..HERE },
            Position { page: 18, ..HERE },
        ] {
            assert!(key(1).read_record(&page, elsewhere).is_err());
        }
        assert!(key(2).read_record(&page, HERE).is_err(), "another device's key");
        for bit in 0..RECORD_BYTES * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(key(1).read_record(&page, HERE).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_summary_reads_back_and_damage_is_noticed() {
        let headers: Vec<_> = (0..20).map(|n| (1 + 4 * u32::from(n), header(n))).collect();
        let place = (3, 8);
        let bytes = key(1).write_summary(&headers, place);
        assert_eq!(bytes.len() as u64, u64::from(cairn_core::summary_pages(20)) * PAGE_BYTES);
        let (entries, trailer) = bytes.split_at(bytes.len() - PAGE_BYTES as usize);
        let found = key(1).read_trailer(trailer, place).unwrap();
        assert_eq!(key(1).read_entries(entries, found, place).unwrap(), headers);
        assert!(key(1).read_trailer(trailer, (3, 7)).is_err(), "an older generation");
        let mut broken = entries.to_vec();
        broken[700] ^= 4;
        assert!(key(1).read_entries(&broken, found, place).is_err());
    }

    #[test]
    fn another_version_is_refused_by_name_and_never_misread() {
        let mut page = vec![0u8; PAGE_BYTES as usize];
        let position = Position { generation: 0, segment: 3, page: 0 };
        key(1).write_segment(&mut page, Position { generation: 8, ..position });
        assert_eq!(key(1).read_segment(&page, 3), Ok(8));
        assert!(key(1).read_segment(&page, 4).is_err());
        page[8] = 2;
        key(1).sign(&mut page[..SEGMENT_BYTES], position);
        let refused = key(1).read_segment(&page, 3);
        assert_eq!(refused, Err(FormatError::Version { what: "segment header", found: 2 }));
    }

    #[test]
    fn a_torn_tombstone_is_skipped() {
        let mut bytes = key(1).write_tombstone(&SpaceId([1; 32]), 7).to_vec();
        bytes.extend(&key(1).write_tombstone(&SpaceId([2; 32]), 8)[..40]);
        assert_eq!(key(1).read_tombstones(&bytes), [(SpaceId([1; 32]), 7)]);
    }
}
