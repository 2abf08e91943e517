//! What there is to compute on, and what of CUDA is missing.

use super::{Finding, Verdict};
use cairn_gpu::backend::cuda::{Absence, CudaInfo, cublaslt_is_here, nvrtc_version, probe};
use cairn_kernels::cuda::LEAST_ARCHITECTURE;

/// What CUDA says of this machine.
pub(super) struct Gpus {
    pub(super) devices: Result<Vec<CudaInfo>, Absence>,
    /// Cards that the kernel knows, whatever libcuda says.
    pub(super) cards: usize,
    pub(super) nvrtc: Option<(u32, u32)>,
    pub(super) cublaslt: bool,
}

impl Gpus {
    pub(super) fn this() -> Self {
        let cards = std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count);
        let devices = probe().map(<[CudaInfo]>::to_vec);
        Self { devices, cards, nvrtc: nvrtc_version().ok(), cublaslt: cublaslt_is_here() }
    }

    pub(super) fn examine(&self) -> Vec<Finding> {
        let devices = match &self.devices {
            Ok(devices) => devices,
            Err(absence) => return vec![self.absent(absence)],
        };
        let mut findings: Vec<Finding> = devices.iter().map(device).collect();
        findings.push(self.compiler());
        if devices.len() > 1 {
            findings.push(peers(devices));
        }
        findings
    }

    fn absent(&self, absence: &Absence) -> Finding {
        let on_cpu = "the runtime computes on the CPU";
        if self.cards == 0 && !matches!(absence, Absence::Broken(_)) {
            return Finding::new("GPU", absence.to_string(), Verdict::Absent, on_cpu);
        }
        Finding::new("GPU", format!("{} cards; {absence}", self.cards), Verdict::Slow, on_cpu).mended_by(
            "the driver's own check: nvidia-smi; inside a container: the NVIDIA container toolkit and --gpus all",
        )
    }

    fn compiler(&self) -> Finding {
        let version = self.nvrtc.map_or("no NVRTC".into(), |(major, minor)| format!("NVRTC {major}.{minor}"));
        let here = format!("{version}, {}", if self.cublaslt { "cuBLASLt" } else { "no cuBLASLt" });
        if self.nvrtc.is_some() && self.cublaslt {
            return Finding::new(
                "CUDA libraries",
                here,
                Verdict::Good,
                "kernels are compiled when they are first needed",
            );
        }
        Finding::new("CUDA libraries", here, Verdict::Slow, "a GPU is not used without both").mended_by(
            "pip install nvidia-cuda-nvrtc nvidia-cublas, and their lib folders on LD_LIBRARY_PATH; kernels can also come from `cairn kernels build`",
        )
    }
}

fn device(info: &CudaInfo) -> Finding {
    let gib = info.memory_bytes as f64 / (1u64 << 30) as f64;
    let capability = format!("{}.{}", info.architecture / 10, info.architecture % 10);
    let here = format!("{} ({capability}), {gib:.0} GiB, at {}", info.name, info.pci);
    if info.architecture < LEAST_ARCHITECTURE {
        return Finding::new("GPU", here, Verdict::Absent, "too old for the kernels; the CPU computes")
            .mended_by("a card of compute capability 8.0 or later");
    }
    Finding::new(
        "GPU",
        here,
        Verdict::Good,
        format!(
            "a worker computes on it with --device cuda:{}, serve --gpu-mib keeps blocks on it",
            info.ordinal
        ),
    )
}

fn peers(devices: &[CudaInfo]) -> Finding {
    let all = devices.len() - 1;
    let short: Vec<String> = devices
        .iter()
        .filter(|device| device.peers.len() < all)
        .map(|device| format!("cuda:{} reaches {} of {all}", device.ordinal, device.peers.len()))
        .collect();
    if short.is_empty() {
        return Finding::new(
            "peer access",
            "every card reaches every other",
            Verdict::Good,
            "blocks go card to card",
        );
    }
    Finding::new("peer access", short.join(", "), Verdict::Slow, "blocks go by host memory between those")
        .mended_by("nvidia-smi topo -p2p r says why; often the IOMMU or the hypervisor")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn card(ordinal: usize, architecture: u32, peers: &[usize]) -> CudaInfo {
        CudaInfo {
            ordinal,
            name: "Card".into(),
            architecture,
            memory_bytes: 80 << 30,
            pci: "0000:01:00.0".into(),
            uuid: [0; 16],
            peers: peers.to_vec(),
        }
    }

    fn verdicts(gpus: &Gpus) -> Vec<(&'static str, Verdict)> {
        gpus.examine().into_iter().map(|finding| (finding.what, finding.verdict)).collect()
    }

    #[test]
    fn machines_with_and_without_cards() {
        let none = Gpus { devices: Err(Absence::NoLibrary), cards: 0, nvrtc: None, cublaslt: false };
        assert_eq!(verdicts(&none), [("GPU", Verdict::Absent)]);
        let lost = Gpus { devices: Err(Absence::NoDevice), cards: 2, nvrtc: None, cublaslt: false };
        assert_eq!(verdicts(&lost), [("GPU", Verdict::Slow)]);
        assert!(lost.examine()[0].fix.is_some());
        let two = vec![card(0, 90, &[1]), card(1, 75, &[])];
        let some = Gpus { devices: Ok(two), cards: 2, nvrtc: Some((13, 0)), cublaslt: false };
        let expected = [
            ("GPU", Verdict::Good),
            ("GPU", Verdict::Absent),
            ("CUDA libraries", Verdict::Slow),
            ("peer access", Verdict::Slow),
        ];
        assert_eq!(verdicts(&some), expected);
        assert!(some.examine()[3].here.contains("cuda:1 reaches 0 of 1"));
    }
}
