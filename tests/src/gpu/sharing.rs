//! Memory that others have a hand in: another process over CUDA IPC, mapped files, another card; and a device that goes away.

use super::Bench;
use cairn_gpu::backend::cuda::{CudaDevice, IpcHandle, KernelFolders, probe};
use cairn_gpu::{Buffer, Copy, Device, DeviceError, Priority, Region, Stream};
use memmap2::MmapMut;
use std::process::Command;
use std::sync::Arc;

const BYTES: usize = 3 << 20;

/// How a process says that this host lets nobody open what it gives out, as in some sandboxes.
const CANNOT_OPEN: u8 = 4;

fn pattern(seed: u8) -> Vec<u8> {
    (0..BYTES).map(|i| (i as u8).wrapping_mul(7).wrapping_add((i >> 11) as u8) ^ seed).collect()
}

/// Another process reads what this one wrote into device memory, and this one what the other did.
///
/// # Panics
/// When it does not.
pub fn between_processes(bench: &Bench, child: &[&str]) {
    let memory = bench.put(&pattern(1));
    bench.stream.synchronize().expect("uploaded");
    let handle = match memory.share() {
        Ok(handle) => handle,
        Err(error) => return println!("SKIPPED: CUDA IPC: {error}"),
    };
    let program = std::env::current_exe().expect("this program");
    let output = Command::new(program).args(child).arg(hex(&handle)).output().expect("it starts");
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    if output.status.code() == Some(i32::from(CANNOT_OPEN)) {
        return println!("SKIPPED: CUDA IPC: memory is given out but cannot be opened: {}", text.trim());
    }
    assert!(output.status.success(), "the other process: {text}");
    assert!(bench.get(&memory) == pattern(2), "what the other process wrote");
    println!("CUDA IPC: another process reads and writes device memory of this one");
}

/// What the other process does, and the status that it ends with.
///
/// # Panics
/// When the handle is none, or the memory holds something else.
pub fn other_process(device: &CudaDevice, handle: &str) -> u8 {
    let bench = Bench::new(device.clone(), 0, 0);
    let bytes: Vec<u8> =
        (0..64).map(|i| u8::from_str_radix(&handle[2 * i..2 * i + 2], 16).expect("hex")).collect();
    let handle = IpcHandle(bytes.try_into().expect("64 bytes"));
    let memory = match device.open_shared(handle, BYTES) {
        Ok(memory) => memory,
        // What the driver refuses, where there is one.
        Err(DeviceError::Failed(text)) if !bench.is_emulated() => {
            println!("{text}");
            return CANNOT_OPEN;
        }
        Err(error) => panic!("not opened: {error}"),
    };
    assert!(bench.get(&memory) == pattern(1), "what the first process wrote");
    bench.stream.upload(&pattern(2), &memory, 0).expect("issued");
    bench.stream.synchronize().expect("written");
    0
}

fn hex(handle: &IpcHandle) -> String {
    handle.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Copies go straight out of a mapping, and into one that may be written; not into one that may not, and nothing is registered twice.
///
/// # Panics
/// When they do not.
pub fn mappings(bench: &Bench) {
    let mut map = MmapMut::map_anon(BYTES).expect("mapped");
    map.copy_from_slice(&pattern(3));
    let map = Arc::new(memmap2::MmapRaw::from(map));
    let device = bench.device.allocate(BYTES).expect("device memory");
    let region = |buffer| Region { buffer, offset: 0, bytes: BYTES };
    {
        let source = bench.device.register(map.clone(), true).expect("registered");
        assert!(bench.device.register(map.clone(), true).is_err(), "registered twice");
        let there = Copy {
            source: region(Buffer::Pinned(source.clone())),
            target: region(Buffer::Device(device.clone())),
        };
        bench.stream.copy(vec![there]).expect("issued");
        assert!(bench.get(&device) == pattern(3), "out of a mapping");
        bench.stream.upload(&pattern(4), &device, 0).expect("issued");
        let back =
            Copy { source: region(Buffer::Device(device.clone())), target: region(Buffer::Pinned(source)) };
        bench.stream.copy(vec![back]).expect("issued");
        bench.stream.record().expect("recorded").wait().expect("no failure");
    }
    if !bench.device.registers_read_only() {
        return println!("SKIPPED: this device cannot read mappings that cannot be written");
    }
    let mut tries = 0..5000;
    let read_only = loop {
        // What was registered goes with the last copy that named it, a moment after its event.
        match bench.device.register(map.clone(), false) {
            Ok(shared) => break shared,
            Err(error) if tries.next().is_none() => panic!("not registered again: {error}"),
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    };
    let refused = Copy {
        source: region(Buffer::Device(device.clone())),
        target: region(Buffer::Pinned(read_only.clone())),
    };
    assert!(
        matches!(bench.stream.copy(vec![refused]), Err(DeviceError::Failed(_))),
        "into a read-only mapping"
    );
    let there =
        Copy { source: region(Buffer::Pinned(read_only)), target: region(Buffer::Device(device.clone())) };
    bench.stream.copy(vec![there]).expect("issued");
    assert!(bench.get(&device) == pattern(4), "what was copied into the mapping");
    println!("mapped memory: copies go out of it and into it; not into what may only be read");
}

/// Copies from card to card, where there are two.
///
/// # Panics
/// When bytes change on the way.
pub fn between_cards(bench: &Bench, folders: &KernelFolders) {
    let devices = probe().map(<[_]>::to_vec).unwrap_or_default();
    let here = bench.device.info().ordinal;
    let Some(other) = devices.iter().find(|device| device.ordinal != here) else {
        return println!("SKIPPED: peer copies need a second device");
    };
    let other = CudaDevice::open(other.ordinal, folders.clone()).expect("the other card");
    if bench.device.info().peers.contains(&other.info().ordinal) {
        bench.device.reach(&other).expect("peer access");
        bench.device.reach(&other).expect("peer access twice is no error");
    }
    let (from, to) = (bench.put(&pattern(5)), other.allocate(BYTES).expect("device memory"));
    let region =
        |memory: &_| Region { buffer: Buffer::Device(Clone::clone(memory)), offset: 0, bytes: BYTES };
    bench.stream.copy(vec![Copy { source: region(&from), target: region(&to) }]).expect("issued");
    bench.stream.synchronize().expect("copied");
    assert!(Bench::new(other, 0, 0).get(&to) == pattern(5), "card to card");
    println!("cards: bytes go from one to the other");
}

/// A device that is lost in the middle says so at every call and every event, and nothing waits for ever. Only for the emulator, which is
/// told when to fail.
///
/// # Panics
/// When something else happens.
pub fn lost(device: &CudaDevice) {
    let stream = device.stream(Priority::Foreground).expect("a stream");
    let (a, b) = (device.allocate(1000).expect("memory"), device.allocate(1000).expect("memory"));
    let region = |memory: &_| Region { buffer: Buffer::Device(Clone::clone(memory)), offset: 0, bytes: 1000 };
    let mut events = Vec::new();
    let failed = loop {
        let copied = stream.copy(vec![Copy { source: region(&a), target: region(&b) }]);
        match copied.and_then(|()| stream.record()) {
            Ok(event) => events.push(event),
            Err(error) => break error,
        }
        assert!(events.len() < 100_000, "the device never fails");
    };
    assert!(matches!(failed, DeviceError::Lost(_)), "{failed}");
    let outcomes: Vec<_> = events.iter().map(cairn_gpu::Event::wait).collect();
    let first_lost = outcomes.iter().position(Result::is_err).unwrap_or(outcomes.len());
    assert!(outcomes[first_lost..].iter().all(Result::is_err), "work after the loss did not run");
    assert!(matches!(device.allocate(1000), Err(DeviceError::Lost(_))), "memory of a lost device");
    assert!(
        matches!(device.stream(Priority::Background), Err(DeviceError::Lost(_))),
        "a stream of a lost device"
    );
    assert!(matches!(stream.synchronize(), Err(DeviceError::Lost(_))));
    println!("lost: said after {first_lost} events, and everything ended");
}
