//! Encryption at rest: AES-256-GCM, one key for each tenant, device and start, so that not even a copy of the directory uses a nonce
//! twice; see `format` for what is stored.

use super::format::{DeviceKey, SALT_BYTES, Seal, TAG_BYTES};
use cairn_core::Record;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of a tenant's key.
pub const KEY_BYTES: usize = 32;

/// A text cannot be read with this key: it is another key's, or it was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WrongKey;

/// The tenants whose blocks are encrypted on this device, with what their keys are derived from.
#[derive(Clone, Default)]
pub(crate) struct Ciphers(HashMap<Arc<str>, [u8; 2 * KEY_BYTES]>);

#[derive(Clone, Copy)]
enum Part {
    Payload = 0,
    Checksum = 1,
}

impl Ciphers {
    /// For one device.
    pub(crate) fn new(tenants: &HashMap<String, [u8; KEY_BYTES]>, device: &DeviceKey) -> Self {
        let material = |(tenant, key): (&String, &[u8; KEY_BYTES])| {
            let mut material = [0; 2 * KEY_BYTES];
            material[..KEY_BYTES].copy_from_slice(key);
            material[KEY_BYTES..].copy_from_slice(&device.0);
            (tenant.as_str().into(), material)
        };
        Self(tenants.iter().map(material).collect())
    }

    /// The key of a tenant for one start of the device.
    fn key(&self, tenant: &str, salt: [u8; SALT_BYTES]) -> Option<LessSafeKey> {
        let mut hasher = blake3::Hasher::new_derive_key("cairn 2026 tenant encryption on a device");
        hasher.update(self.0.get(tenant)?).update(&salt);
        UnboundKey::new(&AES_256_GCM, hasher.finalize().as_bytes()).ok().map(LessSafeKey::new)
    }

    /// Whether blocks of a tenant are encrypted.
    pub(crate) fn encrypts(&self, tenant: &str) -> bool {
        self.0.contains_key(tenant)
    }

    /// Encrypts a payload in place and the checksum in its record.
    pub(crate) fn seal(
        &self,
        record: &mut Record,
        (epoch, salt): (u32, [u8; SALT_BYTES]),
        payload: &mut [u8],
    ) -> Option<Seal> {
        let key = self.key(&record.tenant, salt)?;
        let tag = |part, bytes: &mut [u8]| {
            let nonce = nonce(epoch, record.sequence, part)?;
            let tag = key.seal_in_place_separate_tag(nonce, aad(record), bytes).ok()?;
            <[u8; TAG_BYTES]>::try_from(tag.as_ref()).ok()
        };
        let payload_tag = tag(Part::Payload, payload)?;
        let mut checksum = record.checksum;
        let checksum_tag = tag(Part::Checksum, &mut checksum.0)?;
        record.checksum = checksum;
        Some(Seal { epoch, salt, payload_tag, checksum_tag })
    }

    /// Decrypts the checksum of a record.
    pub(crate) fn open_record(&self, record: &mut Record, seal: &Seal) -> Result<(), WrongKey> {
        let key = self.key(&record.tenant, seal.salt).ok_or(WrongKey)?;
        let nonce = nonce(seal.epoch, record.sequence, Part::Checksum).ok_or(WrongKey)?;
        let mut checksum = record.checksum;
        let opened = key.open_in_place_separate_tag(
            nonce,
            aad(record),
            Tag::from(seal.checksum_tag),
            &mut checksum.0,
            0..,
        );
        opened.map_err(|_| WrongKey)?;
        record.checksum = checksum;
        Ok(())
    }

    /// Decrypts a payload in place.
    pub(crate) fn open_payload(
        &self,
        record: &Record,
        seal: &Seal,
        payload: &mut [u8],
    ) -> Result<(), WrongKey> {
        let key = self.key(&record.tenant, seal.salt).ok_or(WrongKey)?;
        let nonce = nonce(seal.epoch, record.sequence, Part::Payload).ok_or(WrongKey)?;
        let opened =
            key.open_in_place_separate_tag(nonce, aad(record), Tag::from(seal.payload_tag), payload, 0..);
        opened.map(|_| ()).map_err(|_| WrongKey)
    }
}

/// The identity of a block is bound to its text.
fn aad(record: &Record) -> Aad<[u8; 64]> {
    let mut bytes = [0; 64];
    bytes[..32].copy_from_slice(&record.space.0);
    bytes[32..].copy_from_slice(&record.hash.0);
    Aad::from(bytes)
}

/// Unique for each record of a device and part of it; `None` when the numbers ran out, which no device lives to see.
fn nonce(epoch: u32, sequence: u64, part: Part) -> Option<Nonce> {
    let number = sequence.checked_mul(2)? + part as u64;
    let mut bytes = [0; NONCE_LEN];
    bytes[..4].copy_from_slice(&epoch.to_le_bytes());
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    Some(Nonce::assume_unique_for_key(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::{BlockHash, Checksum, SpaceId};

    fn ciphers(key: u8, device: u8) -> Ciphers {
        Ciphers::new(&HashMap::from([("t".to_owned(), [key; KEY_BYTES])]), &DeviceKey([device; 32]))
    }

    #[test]
    fn a_block_reads_back_with_its_key_only_and_under_its_name_only() {
        let plain = Record {
            space: SpaceId([1; 32]),
            tenant: "t".into(),
            block_bytes: 100,
            hash: BlockHash([2; 32]),
            parent: None,
            checksum: Checksum([3; 16]),
            depth: 0,
            sequence: 9,
        };
        let mut record = plain.clone();
        let mut payload = [7u8; 100];
        let seal = ciphers(1, 1).seal(&mut record, (4, [8; SALT_BYTES]), &mut payload).unwrap();
        assert!(payload != [7; 100] && record.checksum != plain.checksum);
        for other in [ciphers(2, 1), ciphers(1, 2), Ciphers::default()] {
            assert_eq!(other.open_record(&mut record.clone(), &seal), Err(WrongKey));
            assert_eq!(other.open_payload(&record, &seal, &mut payload.clone()), Err(WrongKey));
        }
        let renamed = Record { hash: BlockHash([5; 32]), ..record.clone() };
        assert_eq!(ciphers(1, 1).open_payload(&renamed, &seal, &mut payload.clone()), Err(WrongKey));
        ciphers(1, 1).open_payload(&record, &seal, &mut payload).unwrap();
        ciphers(1, 1).open_record(&mut record, &seal).unwrap();
        assert_eq!((record, payload), (plain, [7; 100]));
    }
}
