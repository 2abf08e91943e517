//! Blocks over every wire, both ends in this process, verification on, beside what the machine can do: memcpy, a raw Unix socket, raw
//! TCP, bare TLS, a bare quinn stream, a bare tonic stream. Rounds are interleaved; medians of them.
//!
//! `cargo bench -p cairn-bench --bench transfer -- [--block KIB] [--batch N] [--clients N] [--seconds S] [--mooncake PYTHON] [--redis PORT] [--mtu BYTES]`
//!
//! A get is a lookup and a fetch of the whole batch, a fetch is that alone, a put a reservation and a publish; for the bare ones a request for as many
//! bytes and its answer. A view is the time until the blocks can be read in place: they are verified when they are first read, which is
//! not in it. CPU counts both ends.

use cairn_bench::limits::{Bare, Servers, Tls};
use cairn_bench::peers::{Mooncake, Redis};
use cairn_bench::{tiny, wire};
use cairn_client::{Block, CacheClient, ClientOptions, Security, WireKind};
use cairn_proto::*;
use cairn_server::{Config, Server};
use cairn_transfer::quic::MAX_MTU;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

const WIRES: [WireKind; 4] = [WireKind::Shm, WireKind::Quic, WireKind::Tls, WireKind::Grpc];

#[derive(Clone)]
struct Settings {
    blocks_kib: Vec<u32>,
    batches: Vec<usize>,
    clients: Vec<usize>,
    seconds: f64,
    rounds: usize,
    mooncake: Option<String>,
    redis: Option<u16>,
    /// Of QUIC: the largest packets.
    mtu: Option<u16>,
}

fn settings() -> Settings {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let number = |name: &str| value(name).map(|text| text.parse::<usize>().expect("a number"));
    let one_or = |name: &str, all: &[usize]| number(name).map_or(all.to_vec(), |one| vec![one]);
    if tiny() {
        let (blocks_kib, batches, clients) = (vec![64], vec![2], vec![1]);
        return Settings {
            blocks_kib,
            batches,
            clients,
            seconds: 0.01,
            rounds: 1,
            mooncake: None,
            redis: None,
            mtu: None,
        };
    }
    Settings {
        blocks_kib: one_or("--block", &[64, 256, 1024, 4096]).into_iter().map(|kib| kib as u32).collect(),
        batches: one_or("--batch", &[1, 8, 64]),
        clients: one_or("--clients", &[1, 4]),
        seconds: value("--seconds").map_or(0.25, |text| text.parse().expect("seconds")),
        rounds: 3,
        mooncake: value("--mooncake"),
        redis: number("--redis").map(|port| port as u16),
        mtu: number("--mtu").map(|mtu| mtu as u16),
    }
}

fn space(block_kib: u32) -> KeySpace {
    // 2 KiB a layer: 2 × 16 tokens × 1 head × 32 elements × 2 bytes.
    let layout = Layout::new(block_kib / 2, 1, 32, 16).expect("a valid layout");
    KeySpace::new(SpaceParts::new("bench", [0; 32], Dtype::Bf16, layout)).expect("a valid space")
}

fn names(space: &KeySpace, count: usize, seed: u32) -> Vec<BlockHash> {
    let tokens: Vec<u32> = (0..16 * count as u32).map(|i| i ^ (seed << 12)).collect();
    chain(space, &tokens, |_| &[])
}

fn block(space: &KeySpace, hash: BlockHash) -> Block {
    let bytes: Vec<u8> = (0..space.block_bytes()).map(|i| (i * 31 % 251) as u8 ^ hash.0[0]).collect();
    Block { hash, checksum: Checksum::of(&space.id(), &hash, &bytes), bytes: bytes.into() }
}

/// What is measured.
enum Subject {
    Memcpy(Vec<bytes::Bytes>),
    Bare(Bare),
    PingPong(Bare),
    Tonic(pb::cache_client::CacheClient<tonic::transport::Channel>),
    Get(CacheClient, KeySpace, Vec<BlockHash>),
    Fetch(CacheClient, cairn_client::Run),
    View(CacheClient, cairn_client::Run),
    Put(CacheClient, KeySpace, Vec<Block>, u32),
    Redis(Redis),
}

impl Subject {
    /// One request; returns how long it took, without what belongs to the bench.
    async fn once(&mut self, targets: &mut [Vec<u8>]) -> Duration {
        let bytes: usize = targets.iter().map(Vec::len).sum();
        let started = Instant::now();
        match self {
            Self::Memcpy(source) => {
                for (target, source) in targets.iter_mut().zip(source) {
                    black_box(target).copy_from_slice(black_box(source));
                }
            }
            Self::Bare(bare) => {
                bare.get(targets).await;
            }
            Self::PingPong(bare) => bare.get(&mut [vec![0; 64]]).await,
            Self::Tonic(client) => wire::tonic_get(client, bytes).await,
            Self::Get(client, space, names) => {
                let run = client.lookup(space, names).await.run.expect("resident");
                let fetched = client.fetch(&run, 0, targets).await;
                assert!(fetched.iter().all(|outcome| outcome.is_hit()), "{fetched:?}");
            }
            Self::Fetch(client, run) => {
                let fetched = client.fetch(run, 0, targets).await;
                assert!(fetched.iter().all(|outcome| outcome.is_hit()), "{fetched:?}");
            }
            Self::View(client, run) => {
                let view = client.fetch_view(run, 0, targets.len()).await;
                assert_eq!(view.wire(), Some(WireKind::Shm));
                black_box(&view);
            }
            Self::Put(client, space, blocks, seed) => {
                *seed += 1;
                // The same bytes under fresh names.
                let fresh: Vec<Block> = names(space, blocks.len(), *seed)
                    .into_iter()
                    .zip(blocks.iter())
                    .map(|(hash, block)| {
                        let checksum = Checksum::of(&space.id(), &hash, &block.bytes);
                        Block { hash, checksum, bytes: block.bytes.clone() }
                    })
                    .collect();
                let started = Instant::now();
                let stored = client.publish(space, None, &fresh).await;
                assert!(stored.iter().all(|stored| stored.is_stored()), "{stored:?}");
                return started.elapsed();
            }
            Self::Redis(redis) => redis.get(targets).await,
        }
        started.elapsed()
    }
}

#[derive(Default, Clone)]
struct Sample {
    gb_per_s: f64,
    cpu_s_per_gb: f64,
    latencies_us: Vec<f64>,
}

fn cpu_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// All clients at once, for a while.
async fn measure(subjects: &mut Vec<Subject>, memory: &mut Vec<Vec<Vec<u8>>>, seconds: f64) -> Sample {
    let (cpu, started) = (cpu_seconds(), Instant::now());
    let mut tasks = Vec::new();
    for (mut subject, mut targets) in subjects.drain(..).zip(memory.drain(..)) {
        tasks.push(tokio::spawn(async move {
            let mut times = Vec::new();
            loop {
                times.push(subject.once(&mut targets).await.as_secs_f64());
                let wall = started.elapsed().as_secs_f64();
                if wall > seconds {
                    return (subject, targets, times, wall);
                }
                // Memcpy never waits for anything.
                tokio::task::yield_now().await;
            }
        }));
    }
    let (mut rate, mut gigabytes, mut latencies_us) = (0.0, 0.0, Vec::new());
    for task in tasks {
        let (subject, targets, times, wall) = task.await.expect("no panic");
        let bytes: usize = targets.iter().map(Vec::len).sum();
        // Making fresh names is not part of a put.
        let seconds = if matches!(subject, Subject::Put(..)) { times.iter().sum() } else { wall };
        rate += bytes as f64 * times.len() as f64 / seconds / 1e9;
        gigabytes += bytes as f64 * times.len() as f64 / 1e9;
        latencies_us.extend(times.iter().map(|time| time * 1e6));
        subjects.push(subject);
        memory.push(targets);
    }
    let cpu_s_per_gb = (cpu_seconds() - cpu) / gigabytes;
    Sample { gb_per_s: rate, cpu_s_per_gb, latencies_us }
}

fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}

struct Row {
    gb_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_s_per_gb: f64,
}

fn row(samples: &[Sample]) -> Row {
    let median = |value: fn(&Sample) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(value).collect();
        quantile(&mut values, 0.5)
    };
    let mut all: Vec<f64> = samples.iter().flat_map(|sample| sample.latencies_us.clone()).collect();
    Row {
        gb_per_s: median(|sample| sample.gb_per_s),
        p50_us: quantile(&mut all, 0.5),
        p99_us: quantile(&mut all, 0.99),
        cpu_s_per_gb: median(|sample| sample.cpu_s_per_gb),
    }
}

/// A server, and clients of each wire.
struct Site {
    server: Server,
    tls: Tls,
    bare: Servers,
    servers: tokio::runtime::Handle,
}

impl Site {
    async fn start() -> Self {
        let tls = Tls::new();
        let mut config = Config::default();
        let any = ([127, 0, 0, 1], 0).into();
        config.server.listen = any;
        config.server.http_listen = any;
        config.wires.data_listen = Some(any);
        config.tls.cert_file = Some(tls.certs.server.0.clone());
        config.tls.key_file = Some(tls.certs.server.1.clone());
        config.wires.quic_max_mtu = settings().mtu.unwrap_or(config.wires.quic_max_mtu);
        config.host.capacity_mib = if tiny() { 64 } else { 1536 };
        config.host.chunk_mib = if tiny() { 16 } else { 64 };
        let server = Server::start(config).await.expect("a server");
        let bare = Servers::start(&tls, settings().mtu.unwrap_or(MAX_MTU)).await;
        Self { server, tls, bare, servers: tokio::runtime::Handle::current() }
    }

    fn client(&self, wire: WireKind) -> CacheClient {
        let mut options = ClientOptions::new(format!("https://{}", self.server.address()));
        options.security = Security { ca_file: Some(self.tls.certs.ca.clone()), ..Security::default() };
        options.wire = Some(wire);
        // A run is kept for a whole table.
        options.lease_ttl = Duration::from_secs(120);
        options.quic.max_mtu = settings().mtu.unwrap_or(options.quic.max_mtu);
        CacheClient::start(options).expect("a client")
    }

    /// Everything to measure, each once for every client.
    async fn subjects(
        &self,
        settings: &Settings,
        (space, batch, clients): (&KeySpace, usize, usize),
    ) -> Vec<(String, Vec<Subject>)> {
        let source: Vec<Block> = names(space, batch, 0).into_iter().map(|hash| block(space, hash)).collect();
        let names: Vec<BlockHash> = source.iter().map(|block| block.hash).collect();
        let publisher = self.client(WireKind::Shm);
        publisher.publish(space, None, &source).await;
        let mut all: BTreeMap<String, Vec<Subject>> = BTreeMap::new();
        for i in 0..clients as u32 {
            let mut add = |name: &str, subject| all.entry(name.into()).or_default().push(subject);
            add("0 memcpy", Subject::Memcpy(source.iter().map(|block| block.bytes.clone()).collect()));
            for (name, bare) in self.bare.connect().await {
                add(&format!("1 {name}"), Subject::Bare(bare));
            }
            let unix = self.bare.connect().await.into_iter().next().expect("a Unix socket");
            add("1 unix ping-pong", Subject::PingPong(unix.1));
            add("1 bare tonic", Subject::Tonic(wire::bare_tonic(&self.tls, &self.servers).await));
            for (order, wire) in WIRES.into_iter().enumerate() {
                let client = self.client(wire);
                add(
                    &format!("2{order} {wire} get"),
                    Subject::Get(client.clone(), space.clone(), names.clone()),
                );
                let run = client.lookup(space, &names).await.run.expect("resident");
                add(&format!("2{order} {wire} fetch"), Subject::Fetch(client.clone(), run));
                let seed = (i + 1) * 100_000 + order as u32 * 20_000;
                add(
                    &format!("3{order} {wire} put"),
                    Subject::Put(client, space.clone(), source.clone(), seed),
                );
            }
            let client = self.client(WireKind::Shm);
            let run = client.lookup(space, &names).await.run.expect("resident");
            add("20 shm view", Subject::View(client, run));
            if let Some(port) = settings.redis {
                let redis = Redis::connect(port, space.block_bytes() as usize, batch).await;
                add("4 redis get", Subject::Redis(redis));
            }
        }
        all.into_iter().collect()
    }
}

async fn table(site: &Site, settings: &Settings, (block_kib, batch, clients): (u32, usize, usize)) {
    let space = space(block_kib);
    let mut subjects = site.subjects(settings, (&space, batch, clients)).await;
    let bytes = space.block_bytes() as usize;
    let mut memory = vec![vec![vec![0u8; bytes]; batch]; clients];
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); subjects.len()];
    for _ in 0..settings.rounds {
        for ((name, subject), samples) in subjects.iter_mut().zip(&mut samples) {
            // So that every byte below came from this one.
            memory.iter_mut().flatten().for_each(|target| target.fill(0xEE));
            // The first one is not counted: connections warm up, chunks are mapped.
            measure(subject, &mut memory, settings.seconds / 10.0).await;
            samples.push(measure(subject, &mut memory, settings.seconds).await);
            if (name.ends_with(" get") || name.ends_with("fetch")) && !name.contains("redis") {
                let right = |(target, hash): (&Vec<u8>, BlockHash)| *target == block(&space, hash).bytes;
                let mut all = memory[0].iter().zip(names(&space, batch, 0));
                assert!(all.all(right), "{name}: every byte arrived");
            }
        }
    }
    let mut rows: Vec<(String, Row)> =
        subjects.iter().zip(&samples).map(|((name, _), samples)| (name.clone(), row(samples))).collect();
    if let Some(python) = &settings.mooncake {
        for (name, gb_per_s, p50_us, p99_us) in Mooncake::run(python, bytes, batch, clients, settings.seconds)
        {
            rows.push((format!("4 {name}"), Row { gb_per_s, p50_us, p99_us, cpu_s_per_gb: f64::NAN }));
        }
    }
    print(&rows, (block_kib, batch, clients));
}

/// What each is held against.
const LIMITS: [(&str, &str); 14] = [
    ("quic fetch", "bare quinn"),
    ("tls fetch", "bare tls"),
    ("grpc fetch", "bare tonic"),
    ("shm fetch", "memcpy"),
    ("shm get", "memcpy"),
    ("shm put", "memcpy"),
    ("shm view", "unix ping-pong"),
    ("quic get", "bare quinn"),
    ("quic put", "bare quinn"),
    ("tls get", "bare tls"),
    ("tls put", "bare tls"),
    ("grpc get", "bare tonic"),
    ("grpc put", "bare tonic"),
    ("bare quinn", "raw tcp"),
];

fn print(rows: &[(String, Row)], (block_kib, batch, clients): (u32, usize, usize)) {
    println!("\n{block_kib} KiB × {batch}, {clients} client(s)");
    println!("{:22} {:>8} {:>10} {:>10} {:>9}   share of", "", "GB/s", "p50 µs", "p99 µs", "CPU-s/GB");
    let find =
        |name: &str| rows.iter().find(|(full, _)| full.split_once(' ').is_some_and(|(_, n)| n == name));
    for (full, row) in rows {
        let name = full.split_once(' ').map_or(full.as_str(), |(_, name)| name);
        let limit = LIMITS.iter().find(|(ours, _)| *ours == name).and_then(|(_, limit)| find(limit));
        let share = limit.map_or_else(String::new, |(limit_name, limit)| match name {
            "shm view" => format!("{:.2} × {}", row.p50_us / limit.p50_us, &limit_name[2..]),
            _ => format!("{:.2} {}", row.gb_per_s / limit.gb_per_s, &limit_name[2..]),
        });
        let Row { gb_per_s, p50_us, p99_us, cpu_s_per_gb } = row;
        let rate = match name {
            // They carry no bytes of blocks.
            "shm view" | "unix ping-pong" => "-".into(),
            _ => format!("{gb_per_s:.2}"),
        };
        println!("{name:22} {rate:>8} {p50_us:10.0} {p99_us:10.0} {cpu_s_per_gb:9.3}   {share}");
    }
}

/// Two threads.
fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().expect("a runtime")
}

fn main() {
    // Servers have threads of their own, as in processes of their own: on one runtime, whether both ends of a connection share a
    // thread is chance.
    let servers = runtime();
    runtime().block_on(run(servers.handle()));
}

async fn run(servers: &tokio::runtime::Handle) {
    let settings = settings();
    println!(
        "median of {} rounds of {} s each; get = lookup and fetch of the whole batch, verified; CPU of both ends",
        settings.rounds, settings.seconds
    );
    for block_kib in settings.blocks_kib.clone() {
        for batch in settings.batches.clone() {
            for clients in settings.clients.clone() {
                let site = servers.spawn(Site::start()).await.expect("a server");
                table(&site, &settings, (block_kib, batch, clients)).await;
                let end = servers.spawn(site.server.shutdown()).await.expect("no panic");
                end.expect("an orderly end");
            }
        }
    }
}
