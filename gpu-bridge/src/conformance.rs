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
    streams_may_copy_both_ways_at_once(device);
    memory_lives_until_its_copies_end(device);
    mistakes_are_refused_before_anything_is_issued(device);
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn region<D: Device>(buffer: &Buffer<D>, offset: usize, bytes: usize) -> Region<D> {
    Region { buffer: buffer.clone(), offset, bytes }
}

fn pinned<D: Device>(device: &D, content: &[u8]) -> Buffer<D> {
    let mut buffer = device.allocate_pinned(content.len()).expect("pinned memory");
    buffer.as_mut().copy_from_slice(content);
    Buffer::Pinned(device.share(buffer))
}

/// Takes a buffer back once whatever used it has let go, and reads it.
fn content<D: Device>(device: &D, buffer: Buffer<D>) -> Vec<u8> {
    let Buffer::Pinned(mut pinned) = buffer else { panic!("only pinned memory is readable") };
    for _ in 0..1000 {
        match device.reclaim(pinned) {
            Ok(buffer) => return buffer.as_ref().to_vec(),
            Err(back) => pinned = back,
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("pinned memory is still in use after everything ended");
}

fn copies_go_round_and_keep_their_order<D: Device>(device: &D) {
    const BYTES: usize = 100_000;
    const HALF: usize = BYTES / 2;
    let (first, second) = (pattern(BYTES, 1), pattern(BYTES, 2));
    let (a, b) = (pinned(device, &first), pinned(device, &second));
    let result = pinned(device, &vec![0; BYTES]);
    let middle = Buffer::Device(device.allocate(BYTES).expect("device memory"));
    let stream = device.stream(Priority::Foreground).expect("a stream");
    let copy = |source, target| Copy { source, target };
    stream.copy(vec![copy(region(&a, 0, BYTES), region(&middle, 0, BYTES))]).expect("issued");
    let halves = vec![
        copy(region(&b, 0, HALF), region(&middle, HALF, HALF)),
        copy(region(&a, HALF, HALF), region(&middle, 0, HALF)),
    ];
    stream.copy(halves).expect("issued");
    stream.copy(vec![copy(region(&middle, 0, BYTES), region(&result, 0, BYTES))]).expect("issued");
    stream.record().expect("recorded").wait().expect("no failure");
    let got = content(device, result);
    assert!(
        got[..HALF] == first[HALF..] && got[HALF..] == second[..HALF],
        "copies of one stream run in order"
    );
}

fn events_order_streams<D: Device>(device: &D) {
    const BYTES: usize = 4 << 20;
    let source = pattern(BYTES, 3);
    let a = pinned(device, &source);
    let result = pinned(device, &vec![0; BYTES]);
    let middle = Buffer::Device(device.allocate(BYTES).expect("device memory"));
    let first = device.stream(Priority::Foreground).expect("a stream");
    let second = device.stream(Priority::Background).expect("a stream");
    let in_copy = Copy { source: region(&a, 0, BYTES), target: region(&middle, 0, BYTES) };
    first.copy(vec![in_copy]).expect("issued");
    let arrived = first.record().expect("recorded");
    second.wait(&arrived).expect("issued");
    let out_copy = Copy { source: region(&middle, 0, BYTES), target: region(&result, 0, BYTES) };
    second.copy(vec![out_copy]).expect("issued");
    second.record().expect("recorded").wait().expect("no failure");
    // On a device another thread says so, a moment later.
    assert_eq!(arrived.wait(), Ok(()), "what was waited for has completed");
    assert!(content(device, result) == source, "the second stream waited for the first");
}

fn blocks_go_through_the_pool<D: Device>(device: &D) {
    for kv_type in [KvType::F32, KvType::F16, KvType::Bf16] {
        let shape = PagedShape { layers: 3, kv_heads: 2, head_dim: 16, block_tokens: 16, slots: 5, kv_type };
        let bytes = shape.block_bytes();
        let blocks = pattern(3 * bytes, 9);
        let staging = pinned(device, &blocks);
        let result = pinned(device, &vec![0; 3 * bytes]);
        let pool = device.allocate(shape.pool_bytes()).expect("device memory");
        let stream = device.stream(Priority::Foreground).expect("a stream");
        let place = |i: usize, slot| BlockMove { staging_offset: i * bytes, slot };
        let moves = vec![place(0, 4), place(1, 0), place(2, 2)];
        stream.scatter(shape, &staging, &pool, moves).expect("issued");
        let swapped = vec![place(0, 2), place(1, 4), place(2, 0)];
        stream.gather(shape, &pool, &result, swapped).expect("issued");
        stream.record().expect("recorded").wait().expect("no failure");
        let got = content(device, result);
        let order = [2, 0, 1];
        for (i, from) in order.into_iter().enumerate() {
            assert!(got[i * bytes..][..bytes] == blocks[from * bytes..][..bytes], "{kv_type:?} block {i}");
        }
    }
}

fn streams_may_copy_both_ways_at_once<D: Device>(device: &D) {
    const HALF: usize = 1 << 16;
    let memory = || Buffer::Device(device.allocate(2 * HALF).expect("device memory"));
    let (a, b) = (memory(), memory());
    let streams = [(); 2].map(|()| device.stream(Priority::Foreground).expect("a stream"));
    for _ in 0..200 {
        let there = Copy { source: region(&a, 0, HALF), target: region(&b, 0, HALF) };
        let back = Copy { source: region(&b, HALF, HALF), target: region(&a, HALF, HALF) };
        streams[0].copy(vec![there]).expect("issued");
        streams[1].copy(vec![back]).expect("issued");
    }
    for stream in &streams {
        stream.record().expect("recorded").wait().expect("no failure");
    }
}

fn memory_lives_until_its_copies_end<D: Device>(device: &D) {
    const BYTES: usize = 1 << 20;
    let source = pattern(BYTES, 5);
    let result = pinned(device, &vec![0; BYTES]);
    let stream = device.stream(Priority::Foreground).expect("a stream");
    {
        let a = pinned(device, &source);
        let middle = Buffer::Device(device.allocate(BYTES).expect("device memory"));
        let copies = [
            Copy { source: region(&a, 0, BYTES), target: region(&middle, 0, BYTES) },
            Copy { source: region(&middle, 0, BYTES), target: region(&result, 0, BYTES) },
        ];
        copies.into_iter().for_each(|copy| stream.copy(vec![copy]).expect("issued"));
    }
    let event = stream.record().expect("recorded");
    drop(stream);
    event.wait().expect("a dropped stream finishes what was issued");
    assert!(content(device, result) == source);
}

fn mistakes_are_refused_before_anything_is_issued<D: Device>(device: &D) {
    let a = pinned(device, &[1; 64]);
    let b = pinned(device, &[0; 64]);
    let stream = device.stream(Priority::Foreground).expect("a stream");
    let good = || Copy { source: region(&a, 0, 8), target: region(&b, 0, 8) };
    let outside = Copy { source: region(&a, 60, 8), target: region(&b, 0, 8) };
    let refused = stream.copy(vec![good(), outside]);
    assert_eq!(refused, Err(DeviceError::OutOfBounds { offset: 60, end: 68, len: 64 }));
    let uneven = Copy { source: region(&a, 0, 8), target: region(&b, 0, 9) };
    assert_eq!(stream.copy(vec![good(), uneven]), Err(DeviceError::SizeMismatch { from: 8, to: 9 }));
    stream.record().expect("recorded").wait().expect("no failure");
    assert_eq!(content(device, b), [0; 64], "a refused batch copies nothing");
    let held = device.share(device.allocate_pinned(8).expect("pinned memory"));
    let other = held.clone();
    let back = device.reclaim(held).err().expect("another handle has the memory");
    drop(other);
    assert!(device.reclaim(back).is_ok());
}
