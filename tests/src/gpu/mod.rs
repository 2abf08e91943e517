//! Checks of a CUDA device, whether it is a card or the emulator: conformance, and every kernel against its plain reference with
//! fresh random inputs and poisoned outputs.

mod attention;
mod checksums;
pub mod first_token;
mod layers;
mod moves;
mod products;
pub mod remote;
mod sampling;
pub mod sharing;
pub mod speed;
pub mod tier;
pub mod tokens;

use cairn_gpu::backend::cuda::{CudaDevice, CudaMemory, CudaStream};
use cairn_gpu::{Buffer, Copy, Device, Priority, Region, Stream};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::sync::Arc;

/// What output buffers hold before a kernel writes them.
const POISON: u8 = 0xA5;

/// A device under test.
pub struct Bench {
    /// The device.
    pub device: CudaDevice,
    /// Where all work of a check goes.
    pub stream: Arc<CudaStream>,
    rng: StdRng,
    /// How many random cases of each kind.
    pub cases: usize,
}

impl Bench {
    /// # Panics
    /// When the device has no stream.
    pub fn new(device: CudaDevice, seed: u64, cases: usize) -> Self {
        let stream = Arc::new(device.stream(Priority::Foreground).expect("a stream"));
        Self { device, stream, rng: StdRng::seed_from_u64(seed), cases }
    }

    /// Runs every check; says on standard output what passed.
    ///
    /// # Panics
    /// At the first thing that is wrong.
    pub fn kernels(&mut self, products: bool) {
        for case in 0..self.cases {
            moves::check(self, case);
            checksums::check(self, case);
            layers::check(self, case);
            attention::check(self, case);
            sampling::check(self);
            if products {
                products::check(self, case);
            }
        }
    }

    /// Device memory with these bytes.
    fn put(&self, bytes: &[u8]) -> CudaMemory {
        let memory = self.device.allocate(bytes.len()).expect("device memory");
        self.stream.upload(bytes, &memory, 0).expect("issued");
        memory
    }

    fn put_f32(&self, numbers: &[f32]) -> CudaMemory {
        self.put(bytemuck::cast_slice(numbers))
    }

    /// Poisoned device memory for an output.
    fn poisoned(&self, bytes: usize) -> CudaMemory {
        self.put(&vec![POISON; bytes])
    }

    /// What is in device memory once all work so far has ended.
    fn get(&self, memory: &CudaMemory) -> Vec<u8> {
        let bytes = memory.len();
        let pinned = self.device.share(self.device.allocate_pinned(bytes).expect("pinned memory"));
        let region = |buffer| Region { buffer, offset: 0, bytes };
        let (source, target) =
            (region(Buffer::Device(memory.clone())), region(Buffer::Pinned(pinned.clone())));
        self.stream.copy(vec![Copy { source, target }]).expect("issued");
        self.stream.record().expect("recorded").wait().expect("no failure");
        let mut pinned = pinned;
        for _ in 0..10_000 {
            match self.device.reclaim(pinned) {
                Ok(buffer) => return buffer.as_ref().to_vec(),
                Err(back) => pinned = back,
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("pinned memory is still in use after its copy ended");
    }

    fn get_f32(&self, memory: &CudaMemory) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(&self.get(memory))
    }

    /// So many numbers around zero.
    fn numbers(&mut self, count: usize, spread: f32) -> Vec<f32> {
        (0..count).map(|_| self.rng.random_range(-spread..spread)).collect()
    }

    /// Whether the device is the emulator.
    pub fn is_emulated(&self) -> bool {
        self.device.info().name.starts_with("Emulated")
    }

    fn below(&mut self, limit: usize) -> usize {
        self.rng.random_range(0..limit)
    }
}

/// Numbers as they are in memory of a format, and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    F32,
    F16,
    Bf16,
}

impl Format {
    fn encode(self, numbers: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => bytemuck::cast_slice(numbers).to_vec(),
            Self::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            Self::Bf16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        }
    }

    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        match self {
            Self::F32 => bytemuck::pod_collect_to_vec(bytes),
            Self::F16 => halves().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
            Self::Bf16 => halves().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        }
    }

    /// As it is after it was stored once.
    fn round(self, numbers: &[f32]) -> Vec<f32> {
        self.decode(&self.encode(numbers))
    }

    /// Largest relative error of one rounding.
    fn unit(self) -> f64 {
        match self {
            Self::F32 => 2f64.powi(-24),
            Self::F16 => 2f64.powi(-11),
            Self::Bf16 => 2f64.powi(-8),
        }
    }
}

/// # Panics
/// When a number is farther from the exact one than `relative` of it, or of one.
fn close(what: &str, got: &[f32], exact: &[f64], relative: f64) {
    assert_eq!(got.len(), exact.len(), "{what}");
    for (i, (got, exact)) in got.iter().zip(exact).enumerate() {
        let error = (f64::from(*got) - exact).abs();
        assert!(error <= relative * (1.0 + exact.abs()), "{what}: element {i} is {got}, not {exact}");
    }
}
