//! The golden vectors, made by the independent Python code in `tests/python/cairn_reference.py`.

#![allow(clippy::unwrap_used)]

use cairn_proto::*;
use serde_json::Value;

fn number(value: &Value) -> u32 {
    u32::try_from(value.as_u64().unwrap()).unwrap()
}

fn bytes<const N: usize>(value: &Value) -> [u8; N] {
    hex::decode(value.as_str().unwrap()).unwrap().try_into().unwrap()
}

fn space(value: &Value) -> KeySpace {
    let (layout, shard) = (&value["layout"], &value["shard"]);
    KeySpace::new(SpaceParts {
        tenant: value["tenant"].as_str().unwrap().into(),
        tenant_salt: bytes(&value["tenant_salt"]),
        model_fingerprint: bytes(&value["model_fingerprint"]),
        dtype: match value["dtype"].as_str().unwrap() {
            "f32" => Dtype::F32,
            "f16" => Dtype::F16,
            "bf16" => Dtype::Bf16,
            "fp8_e4m3" => Dtype::Fp8E4m3,
            other => panic!("{other}"),
        },
        layout: Layout::new(
            number(&layout["layers"]),
            number(&layout["kv_heads"]),
            number(&layout["head_dim"]),
            number(&layout["block_tokens"]),
        )
        .unwrap(),
        shard: Shard {
            first_layer: number(&shard["first_layer"]),
            total_layers: number(&shard["total_layers"]),
            first_kv_head: number(&shard["first_kv_head"]),
            total_kv_heads: number(&shard["total_kv_heads"]),
        },
        hash_protocol: match value["hash_protocol"].as_str().unwrap() {
            "cairn_blake3_v1" => HashProtocol::CairnBlake3V1,
            "vllm_sha256" => HashProtocol::VllmSha256,
            other => panic!("{other}"),
        },
    })
    .unwrap()
}

fn extra_keys(value: &Value, block: usize) -> Vec<ExtraKey> {
    let keys = value.get(block.to_string());
    let key = |pair: &Value| {
        let text = pair[1].as_str().unwrap();
        match pair[0].as_str().unwrap() {
            "lora" => ExtraKey::Lora(text.into()),
            "media" => ExtraKey::Media(hex::decode(text).unwrap()),
            "salt" => ExtraKey::Salt(hex::decode(text).unwrap()),
            other => panic!("{other}"),
        }
    };
    keys.map(|keys| keys.as_array().unwrap().iter().map(key).collect()).unwrap_or_default()
}

#[test]
fn identity_is_what_the_vectors_say() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/vectors/identity.json");
    let vectors: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(vectors["format"], 1);
    let cases = vectors["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let space = space(&case["space"]);
        assert_eq!(space.id().to_string(), case["space_id"].as_str().unwrap());
        assert_eq!(space.block_bytes(), case["block_bytes"].as_u64().unwrap());
        assert_eq!(
            KeySpace::try_from(&pb::KeySpace::from(&space)).unwrap().id(),
            space.id(),
            "by way of the wire"
        );
        let tokens: Vec<u32> = case["tokens"].as_array().unwrap().iter().map(number).collect();
        let keys: Vec<Vec<ExtraKey>> =
            (0..tokens.len()).map(|block| extra_keys(&case["extra_keys"], block)).collect();
        let hashes = chain(&space, &tokens, |block| &keys[block]);
        let expected: Vec<&str> =
            case["hashes"].as_array().unwrap().iter().map(|h| h.as_str().unwrap()).collect();
        assert_eq!(hashes.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
        for sum in case["checksums"].as_array().unwrap() {
            let length = sum["payload_bytes"].as_u64().unwrap() as usize;
            let payload: Vec<u8> = (0..length).map(|i| ((31 * i + 7) % 251) as u8).collect();
            assert_eq!(Checksum::of(&space.id(), &hashes[0], &payload).0, bytes(&sum["checksum"]));
        }
    }
}

#[test]
fn nonsense_from_the_wire_is_named() {
    let good = || {
        pb::KeySpace::from(&space(&serde_json::json!({
        "tenant": "t", "tenant_salt": "00".repeat(32), "model_fingerprint": "00".repeat(32), "dtype": "bf16",
        "layout": {"layers": 2, "kv_heads": 2, "head_dim": 64, "block_tokens": 16},
        "shard": {"first_layer": 0, "total_layers": 2, "first_kv_head": 0, "total_kv_heads": 2},
        "hash_protocol": "cairn_blake3_v1"})))
    };
    let refused = |change: &dyn Fn(&mut pb::KeySpace)| {
        let mut message = good();
        change(&mut message);
        KeySpace::try_from(&message).unwrap_err().to_string()
    };
    assert!(refused(&|m| m.tenant_salt = vec![0; 31].into()).contains("tenant_salt has 31 bytes"));
    assert!(refused(&|m| m.tenant = String::new()).contains("tenant"));
    assert!(refused(&|m| m.dtype = 77).contains("dtype"));
    assert!(refused(&|m| m.layout = None).contains("layout"));
    assert!(refused(&|m| m.layout.as_mut().unwrap().order = 0).contains("layout.order"));
    assert!(refused(&|m| m.layout.as_mut().unwrap().head_dim = 1 << 20).contains("from 1 to 65536"));
    assert!(refused(&|m| m.shard.as_mut().unwrap().first_layer = 1).contains("first_layer"));
    let huge = |m: &mut pb::KeySpace| {
        let layout = m.layout.as_mut().unwrap();
        (layout.layers, layout.kv_heads, layout.head_dim) = (60_000, 60_000, 60_000);
        let shard = m.shard.as_mut().unwrap();
        (shard.total_layers, shard.total_kv_heads) = (60_000, 60_000);
    };
    assert!(refused(&huge).contains("fewer tokens"), "sizes that overflow are refused, not wrapped");
    assert!(BlockHash::parse_list(&[0; 33]).is_err());
    assert!(wire::parse_outcomes(&[pb::OutcomeRun { count: 3, kind: 9, tier: 0, reason: 0 }], 3).is_err());
}
