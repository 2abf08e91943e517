//! The single looks at a machine. Files of the kernel are read below a root, so that tests can show other machines.

use super::gpus::Gpus;
use super::{Finding, Verdict};
use rustix::process::{Resource, getrlimit};
use std::path::{Path, PathBuf};

/// Socket buffers that the QUIC wire asks for.
const SOCKET_BUFFER_BYTES: u64 = 4 << 20;

/// Descriptors beyond which nothing small is in the way: connections, segments and chunks take one each.
const ENOUGH_FILES: u64 = 8192;

/// Memory that can be locked beyond which registrations are not in the way of the default server.
const ENOUGH_LOCKED_BYTES: u64 = 2 << 30;

const GIB: f64 = (1u64 << 30) as f64;

/// What can be asked about.
pub(super) struct Machine {
    root: PathBuf,
    isa: String,
    io_uring: Result<(), String>,
    locked_bytes: Option<u64>,
    files: Option<u64>,
    rdma: Result<Vec<String>, String>,
    gpus: Gpus,
}

impl Machine {
    pub(super) fn this() -> Self {
        let limit = |resource| getrlimit(resource).current;
        let rdma = if cairn_client::HAS_RDMA {
            Ok(cairn_client::rdma_addresses().iter().map(ToString::to_string).collect())
        } else {
            Err("this build is without the feature rdma".into())
        };
        Self {
            root: "/".into(),
            isa: format!("{:?}", cairn_runtime::Isa::detect()),
            io_uring: cairn_server::nvme::io_uring_works().map_err(|error| error.to_string()),
            locked_bytes: limit(Resource::Memlock),
            files: limit(Resource::Nofile),
            rdma,
            gpus: Gpus::this(),
        }
    }

    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }

    fn entries(&self, path: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    pub(super) fn examine(&self, folder: Option<&Path>) -> Vec<Finding> {
        let mut findings = vec![self.cpu(), self.memory(), self.numa(), self.huge_pages()];
        findings.extend([self.locked(), self.files(), self.uring(), self.socket_buffers()]);
        findings.extend(self.gpus.examine());
        findings.push(self.rdma());
        match folder {
            Some(folder) => findings.extend(self.disk(folder)),
            None => findings.push(
                Finding::new(
                    "disk",
                    "not looked at",
                    Verdict::Absent,
                    "no NVMe tier without a folder for it",
                )
                .mended_by("cairn doctor --dir FOLDER"),
            ),
        }
        findings
    }

    fn cpu(&self) -> Finding {
        let info = self.read("proc/cpuinfo").unwrap_or_default();
        let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let name = name.map_or("an unknown CPU", |(_, name)| name.trim());
        let threads = info.lines().filter(|line| line.starts_with("processor")).count();
        let here = format!("{name}, {threads} threads");
        match self.isa.as_str() {
            "Portable" => Finding::new(
                "CPU",
                here,
                Verdict::Slow,
                "no AVX2 or AVX-512: the CPU runtime computes with plain code, several times slower",
            ),
            isa => Finding::new("CPU", here, Verdict::Good, format!("kernels of the CPU runtime for {isa}")),
        }
    }

    fn memory(&self) -> Finding {
        let info = self.read("proc/meminfo").unwrap_or_default();
        let kib = |name: &str| -> u64 {
            let line = info.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
        };
        let gib = |name: &str| kib(name) as f64 * 1024.0 / GIB;
        let here = format!("{:.1} GiB, {:.1} available", gib("MemTotal"), gib("MemAvailable"));
        // A container may have less.
        let group = self.read("sys/fs/cgroup/memory.max").and_then(|text| text.parse::<u64>().ok());
        let usable = kib("MemAvailable").min(group.map_or(u64::MAX, |bytes| bytes / 1024));
        let means = format!("host.capacity_mib up to about {}", usable / 1024 * 3 / 4);
        Finding::new("memory", here, Verdict::Good, means)
    }

    fn numa(&self) -> Finding {
        let nodes = self.entries("sys/devices/system/node");
        let nodes =
            nodes.iter().filter(|name| name.strip_prefix("node").is_some_and(|n| n.parse::<u32>().is_ok()));
        match nodes.count() {
            0 | 1 => Finding::new("NUMA", "one node", Verdict::Good, "nothing to place"),
            count => Finding::new(
                "NUMA",
                format!("{count} nodes"),
                Verdict::Slow,
                "Cairn places nothing: copies across nodes cost up to half of the bandwidth",
            )
            .mended_by("one server a node: numactl --cpunodebind=N --membind=N cairn serve ..."),
        }
    }

    fn huge_pages(&self) -> Finding {
        let chosen = |text: Option<String>| {
            let text = text.unwrap_or_default();
            text.split('[').nth(1).and_then(|rest| rest.split(']').next()).unwrap_or("absent").to_owned()
        };
        let shared = chosen(self.read("sys/kernel/mm/transparent_hugepage/shmem_enabled"));
        let here = format!("for shared memory: {shared}");
        match shared.as_str() {
            "always" | "advise" | "within_size" | "force" => {
                Finding::new("huge pages", here, Verdict::Good, "the host tier asks for them")
            }
            _ => Finding::new(
                "huge pages",
                here,
                Verdict::Slow,
                "the host tier has small pages: first writes and mappings take longer",
            )
            .mended_by("echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        }
    }

    fn locked(&self) -> Finding {
        let (here, enough) = match self.locked_bytes {
            None => ("no limit".into(), true),
            Some(bytes) => (format!("{} MiB", bytes >> 20), bytes >= ENOUGH_LOCKED_BYTES),
        };
        match enough {
            true => Finding::new("locked memory", here, Verdict::Good, "memory can be registered with devices"),
            false => Finding::new(
                "locked memory",
                here,
                Verdict::Slow,
                "RDMA cannot register the host tier, and older kernels not with io_uring either (more CPU per byte)",
            )
            .mended_by("ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit"),
        }
    }

    fn files(&self) -> Finding {
        let (here, enough) = match self.files {
            None => ("no limit".into(), true),
            Some(files) => (files.to_string(), files >= ENOUGH_FILES),
        };
        match enough {
            true => Finding::new("open files", here, Verdict::Good, "enough for a thousand clients"),
            false => Finding::new(
                "open files",
                here,
                Verdict::Slow,
                "connections, segment files and chunks take one each: many clients or large tiers will be refused",
            )
            .mended_by("ulimit -n 65536, or LimitNOFILE=65536 in the systemd unit"),
        }
    }

    fn uring(&self) -> Finding {
        match &self.io_uring {
            Ok(()) => Finding::new("io_uring", "works", Verdict::Good, "the NVMe tier uses it"),
            Err(why) => Finding::new(
                "io_uring",
                why.clone(),
                Verdict::Slow,
                "the NVMe tier reads and writes with threads: more CPU per byte",
            )
            .mended_by(
                "sudo sysctl kernel.io_uring_disabled=0; in a container, a seccomp profile that allows it",
            ),
        }
    }

    fn socket_buffers(&self) -> Finding {
        let limit = |name: &str| {
            self.read(&format!("proc/sys/net/core/{name}")).and_then(|text| text.parse::<u64>().ok())
        };
        let Some(least) = ["rmem_max", "wmem_max"].into_iter().filter_map(limit).min() else {
            return Finding::new(
                "UDP buffers",
                "unknown",
                Verdict::Absent,
                "the limits cannot be read here (a container?)",
            );
        };
        let here = format!("at most {} KiB", least >> 10);
        if least >= SOCKET_BUFFER_BYTES {
            return Finding::new("UDP buffers", here, Verdict::Good, "QUIC gets what it asks for");
        }
        Finding::new(
            "UDP buffers",
            here,
            Verdict::Slow,
            "QUIC asks for 4 MiB: with less it loses packets at high rates",
        )
        .mended_by(format!(
            "sudo sysctl net.core.rmem_max={SOCKET_BUFFER_BYTES} net.core.wmem_max={SOCKET_BUFFER_BYTES}"
        ))
    }

    fn rdma(&self) -> Finding {
        let devices = self.entries("sys/class/infiniband");
        let here = if devices.is_empty() { "none found".to_owned() } else { devices.join(", ") };
        match (&self.rdma, devices.is_empty()) {
            (_, true) => Finding::new("RDMA", here, Verdict::Absent, "QUIC or TLS over TCP between hosts"),
            (Err(why), false) => Finding::new("RDMA", here, Verdict::Slow, format!("not used: {why}"))
                .mended_by("cargo build --release -p cairn --features rdma (needs libibverbs-dev librdmacm-dev libclang-dev pkg-config)"),
            (Ok(addresses), false) if addresses.is_empty() => {
                Finding::new("RDMA", here, Verdict::Slow, "not used: no device has an IPv4 address")
                    .mended_by("ip address add ADDRESS/PREFIX dev INTERFACE")
            }
            (Ok(addresses), false) => {
                let means = format!("wires.rdma_listen can be {}", addresses.join(" or "));
                Finding::new("RDMA", here, Verdict::Good, means)
            }
        }
    }

    fn disk(&self, folder: &Path) -> Vec<Finding> {
        let mut findings = Vec::new();
        let kind = self.file_system(folder);
        match rustix::fs::statvfs(folder) {
            Ok(stat) => {
                let free = (stat.f_bavail * stat.f_frsize) as f64 / GIB;
                let here = format!("{kind}, {free:.1} GiB free");
                let (verdict, means) = match kind.as_str() {
                    "tmpfs" | "ramfs" => {
                        (Verdict::Bad, "that is memory, not a disk: nothing outlives a restart".into())
                    }
                    "nfs" | "nfs4" | "cifs" | "fuse" | "overlay" => {
                        (Verdict::Slow, "a local file system (ext4, xfs) without layers is faster".into())
                    }
                    _ => (Verdict::Good, format!("--nvme-mib up to about {}", (free * 1024.0 * 0.9) as u64)),
                };
                let finding = Finding::new("disk", here, verdict, means);
                findings.push(match verdict {
                    Verdict::Good => finding,
                    _ => finding.mended_by("a folder on a local NVMe drive"),
                });
            }
            Err(error) => {
                findings.push(Finding::new(
                    "disk",
                    error.to_string(),
                    Verdict::Bad,
                    "this folder cannot be used",
                ));
            }
        }
        findings.push(direct(folder));
        findings
    }

    /// Of the longest mount point that the folder is below.
    fn file_system(&self, folder: &Path) -> String {
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let mounts = self.read("proc/self/mounts").unwrap_or_default();
        let mounted = mounts.lines().filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (place, kind) = (words.next()?, words.next()?);
            folder.starts_with(place).then_some((place.len(), kind))
        });
        mounted.max_by_key(|(length, _)| *length).map_or("unknown", |(_, kind)| kind).to_owned()
    }
}

/// Whether files there can be written past the page cache.
fn direct(folder: &Path) -> Finding {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let path = folder.join(format!(".cairn-doctor-{}", std::process::id()));
    let opened = std::fs::OpenOptions::new().create_new(true).write(true).custom_flags(flags).open(&path);
    let _ = std::fs::remove_file(&path);
    match opened {
        Ok(_) => Finding::new("direct IO", "works", Verdict::Good, "blocks do not fill the page cache"),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Finding::new(
            "direct IO",
            "this file system refuses it",
            Verdict::Slow,
            "through the page cache: more CPU, and memory that others need",
        )
        .mended_by("a folder on ext4 or xfs"),
        Err(error) => Finding::new("direct IO", error.to_string(), Verdict::Bad, "no file can be made there")
            .mended_by(format!(
                "a folder that this user may write: chown or another --dir than {}",
                folder.display()
            )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use cairn_gpu::backend::cuda::Absence;

    /// A machine that is described by files.
    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let machine = Machine {
            root: root.path().to_owned(),
            isa: "Avx2".into(),
            io_uring: Ok(()),
            locked_bytes: None,
            files: Some(65_536),
            rdma: Err("without".into()),
            gpus: Gpus { devices: Err(Absence::NoLibrary), cards: 0, nvrtc: None, cublaslt: false },
        };
        (root, machine)
    }

    fn verdicts(machine: &Machine) -> Vec<(&'static str, Verdict)> {
        machine.examine(None).iter().map(|finding| (finding.what, finding.verdict)).collect()
    }

    #[test]
    fn a_large_machine() {
        let (_root, machine) = machine(&[
            ("proc/cpuinfo", "processor : 0\nmodel name : Some CPU\nprocessor : 1\n"),
            ("proc/meminfo", "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n"),
            ("sys/devices/system/node/node0/x", ""),
            ("sys/devices/system/node/node1/x", ""),
            (
                "sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always within_size [advise] never deny force",
            ),
            ("proc/sys/net/core/rmem_max", "8388608"),
            ("proc/sys/net/core/wmem_max", "8388608"),
            ("sys/class/infiniband/mlx5_0/x", ""),
        ]);
        let findings = machine.examine(None);
        assert_eq!(
            (findings[0].here.as_str(), findings[1].here.as_str()),
            ("Some CPU, 2 threads", "1.0 GiB, 0.5 available")
        );
        let slow: Vec<&str> = findings
            .iter()
            .filter(|finding| finding.verdict == Verdict::Slow)
            .map(|finding| finding.what)
            .collect();
        assert_eq!(slow, ["NUMA", "RDMA"]);
        assert!(
            findings
                .iter()
                .filter(|finding| finding.verdict == Verdict::Slow)
                .all(|finding| finding.fix.is_some())
        );
    }

    #[test]
    fn a_machine_where_everything_is_forbidden() {
        let (_root, mut machine) = machine(&[
            (
                "sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always within_size advise [never] deny force",
            ),
            ("proc/sys/net/core/rmem_max", "212992"),
            ("proc/sys/net/core/wmem_max", "8388608"),
        ]);
        machine.isa = "Portable".into();
        machine.io_uring = Err("Operation not permitted".into());
        machine.locked_bytes = Some(8 << 20);
        machine.files = Some(1024);
        let slow = verdicts(&machine).into_iter().filter(|(_, verdict)| *verdict == Verdict::Slow);
        let slow: Vec<&str> = slow.map(|(what, _)| what).collect();
        assert_eq!(slow, ["CPU", "huge pages", "locked memory", "open files", "io_uring", "UDP buffers"]);
    }

    #[test]
    fn a_folder_is_tried() {
        let (root, machine) = machine(&[("proc/self/mounts", "none / tmpfs rw 0 0\n")]);
        let findings = machine.examine(Some(root.path()));
        let disk = findings.iter().find(|finding| finding.what == "disk").unwrap();
        assert_eq!(disk.verdict, Verdict::Bad, "memory is no disk");
        assert!(findings.iter().any(|finding| finding.what == "direct IO"));
        assert!(std::fs::read_dir(root.path()).unwrap().count() == 1, "nothing is left");
        let gone = machine.examine(Some(Path::new("/no/such/folder")));
        assert!(gone.iter().filter(|finding| finding.verdict == Verdict::Bad).count() == 2, "{gone:?}");
    }
}
