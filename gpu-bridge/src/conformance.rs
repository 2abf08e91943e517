//! What every [`Device`] must do. Panics at the first thing that is wrong.

use crate::device::{BlockMove, Buffer, Copy, Device, DeviceError, Priority, Region, Stream};
use cairn_kernels::{KvType, PagedShape};

/// Runs the suite.
///
/// # Panics
/// When the device does not conform.
pub fn run<D: Device>(device: &D) {
    copies_go_round_and_keep_their_order(device);
    events_order_streams(device);
    blocks_go_through_the_pool(device);
    memory_lives_until_its_copies_end(device);
    mistakes_are_refused_before_anything_is_issued(device);
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

fn region<D: Device>(buffer: &Buffer<D>, offset: usize, bytes: usize) -> Region<D> {
    Region {
        buffer: buffer.clone(),
        offset,
        bytes,
    }
}

fn pinned<D: Device>(device: &D, content: &[u8]) -> (D::Pinned, Buffer<D>) {
    let pinned = device.allocate_pinned(content.len()).expect("pinned memory");
    device.write_pinned(&pinned, 0, content).expect("inside");
    (pinned.clone(), Buffer::Pinned(pinned))
}

fn content<D: Device>(device: &D, memory: &D::Pinned, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    device.read_pinned(memory, 0, &mut out).expect("inside");
    out
}

fn copies_go_round_and_keep_their_order<D: Device>(device: &D) {
    const BYTES: usize = 100_000;
    const HALF: usize = BYTES / 2;
    let (first, second) = (pattern(BYTES, 1), pattern(BYTES, 2));
    let ((_, a), (_, b)) = (pinned(device, &first), pinned(device, &second));
    let (out, result) = pinned(device, &vec![0; BYTES]);
    let middle = Buffer::Device(device.allocate(BYTES).expect("device memory"));
    let stream = device.stream(Priority::Foreground).expect("a stream");
    let copy = |source, target| Copy { source, target };
    stream
        .copy(vec![copy(region(&a, 0, BYTES), region(&middle, 0, BYTES))])
        .expect("issued");
    let halves = vec![
        copy(region(&b, 0, HALF), region(&middle, HALF, HALF)),
        copy(region(&a, HALF, HALF), region(&middle, 0, HALF)),
    ];
    stream.copy(halves).expect("issued");
    stream
        .copy(vec![copy(region(&middle, 0, BYTES), region(&result, 0, BYTES))])
        .expect("issued");
    stream.record().expect("recorded").wait().expect("no failure");
    let got = content(device, &out, BYTES);
    assert!(
        got[..HALF] == first[HALF..] && got[HALF..] == second[..HALF],
        "copies of one stream run in order"
    );
}

fn events_order_streams<D: Device>(device: &D) {
    const BYTES: usize = 4 << 20;
    let source = pattern(BYTES, 3);
    let (_, a) = pinned(device, &source);
    let (out, result) = pinned(device, &vec![0; BYTES]);
    let middle = Buffer::Device(device.allocate(BYTES).expect("device memory"));
    let first = device.stream(Priority::Foreground).expect("a stream");
    let second = device.stream(Priority::Background).expect("a stream");
    let in_copy = Copy {
        source: region(&a, 0, BYTES),
        target: region(&middle, 0, BYTES),
    };
    first.copy(vec![in_copy]).expect("issued");
    let arrived = first.record().expect("recorded");
    second.wait(&arrived).expect("issued");
    let out_copy = Copy {
        source: region(&middle, 0, BYTES),
        target: region(&result, 0, BYTES),
    };
    second.copy(vec![out_copy]).expect("issued");
    second.record().expect("recorded").wait().expect("no failure");
    assert_eq!(
        arrived.outcome(),
        Some(Ok(())),
        "what was waited for has completed"
    );
    assert!(
        content(device, &out, BYTES) == source,
        "the second stream waited for the first"
    );
}

fn blocks_go_through_the_pool<D: Device>(device: &D) {
    for kv_type in [KvType::F32, KvType::F16, KvType::Bf16] {
        let shape = PagedShape {
            layers: 3,
            kv_heads: 2,
            head_dim: 16,
            block_tokens: 16,
            slots: 5,
            kv_type,
        };
        let bytes = shape.block_bytes();
        let blocks = pattern(3 * bytes, 9);
        let (_, staging) = pinned(device, &blocks);
        let (out, result) = pinned(device, &vec![0; 3 * bytes]);
        let pool = device.allocate(shape.pool_bytes()).expect("device memory");
        let stream = device.stream(Priority::Foreground).expect("a stream");
        let place = |i: usize, slot| BlockMove {
            staging_offset: i * bytes,
            slot,
        };
        let moves = vec![place(0, 4), place(1, 0), place(2, 2)];
        stream.scatter(shape, &staging, &pool, moves).expect("issued");
        let swapped = vec![place(0, 2), place(1, 4), place(2, 0)];
        stream.gather(shape, &pool, &result, swapped).expect("issued");
        stream.record().expect("recorded").wait().expect("no failure");
        let got = content(device, &out, 3 * bytes);
        let order = [2, 0, 1];
        for (i, from) in order.into_iter().enumerate() {
            assert!(
                got[i * bytes..][..bytes] == blocks[from * bytes..][..bytes],
                "{kv_type:?} block {i}"
            );
        }
    }
}

fn memory_lives_until_its_copies_end<D: Device>(device: &D) {
    const BYTES: usize = 1 << 20;
    let source = pattern(BYTES, 5);
    let (out, result) = pinned(device, &vec![0; BYTES]);
    let stream = device.stream(Priority::Foreground).expect("a stream");
    {
        let (_, a) = pinned(device, &source);
        let middle = Buffer::Device(device.allocate(BYTES).expect("device memory"));
        let copies = [
            Copy {
                source: region(&a, 0, BYTES),
                target: region(&middle, 0, BYTES),
            },
            Copy {
                source: region(&middle, 0, BYTES),
                target: region(&result, 0, BYTES),
            },
        ];
        copies
            .into_iter()
            .for_each(|copy| stream.copy(vec![copy]).expect("issued"));
    }
    let event = stream.record().expect("recorded");
    drop(stream);
    event.wait().expect("a dropped stream finishes what was issued");
    assert!(content(device, &out, BYTES) == source);
}

fn mistakes_are_refused_before_anything_is_issued<D: Device>(device: &D) {
    let (_, a) = pinned(device, &[1; 64]);
    let (out, b) = pinned(device, &[0; 64]);
    let stream = device.stream(Priority::Foreground).expect("a stream");
    let good = || Copy {
        source: region(&a, 0, 8),
        target: region(&b, 0, 8),
    };
    let outside = Copy {
        source: region(&a, 60, 8),
        target: region(&b, 0, 8),
    };
    let refused = stream.copy(vec![good(), outside]);
    assert_eq!(
        refused,
        Err(DeviceError::OutOfBounds {
            offset: 60,
            end: 68,
            len: 64
        })
    );
    let uneven = Copy {
        source: region(&a, 0, 8),
        target: region(&b, 0, 9),
    };
    assert_eq!(
        stream.copy(vec![good(), uneven]),
        Err(DeviceError::SizeMismatch { from: 8, to: 9 })
    );
    stream.record().expect("recorded").wait().expect("no failure");
    assert_eq!(
        content(device, &out, 64),
        [0; 64],
        "a refused batch copies nothing"
    );
    let mut small = [0; 8];
    let pinned = device.allocate_pinned(4).expect("pinned memory");
    assert!(device.read_pinned(&pinned, 0, &mut small).is_err());
    assert!(device.write_pinned(&pinned, 1, &[0; 4]).is_err());
}
