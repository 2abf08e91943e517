//! Blocks over every wire, both ends in this process, verification on, beside what the machine can do (memcpy, a raw Unix socket, raw
//! TCP, bare TLS, a bare quinn stream, a bare tonic stream) and beside other stores. Rounds are interleaved.
//!
//! A get is a lookup and a fetch of the whole batch, a fetch is that alone, a put a reservation and a publish; for the bare ones a
//! request for as many bytes and its answer. A view is the time until the blocks can be read in place: they are verified when they are first
//! read, which is not in it. CPU counts both ends.

use crate::limits::{Bare, Servers, Tls};
use crate::peers::{Peer, Redis, run_script};
use crate::{BenchError, OrFail, Watch, cpu_seconds, wire};
use cairn_client::{Block, CacheClient, ClientOptions, Run, Security, Stored, WireKind};
use cairn_harness::section::{Bar, Bars, Cell, Column, Plot, Role, Section, quantile};
use cairn_proto::{BlockHash, Checksum, Dtype, KeySpace, Layout, SpaceParts, chain, pb};
use cairn_server::{Config, Server};
use cairn_transfer::quic::MAX_MTU;
use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const WIRES: [WireKind; 4] = [WireKind::Shm, WireKind::Quic, WireKind::Tls, WireKind::Grpc];

/// Part of a round that warms up and is not counted.
const WARM_UP: f64 = 0.1;

/// Runs are looked up again before each round, so no round may take longer than this.
const LEASE: Duration = Duration::from_secs(120);

/// Names of puts: never one twice.
static NEXT_NAME: AtomicU32 = AtomicU32::new(1);

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sizes of a block, KiB.
    pub blocks_kib: Vec<u32>,
    /// Blocks of a request.
    pub batches: Vec<usize>,
    /// Clients at a time.
    pub clients: Vec<usize>,
    /// Of one round of one of them.
    pub seconds: f64,
    /// Of each.
    pub rounds: usize,
    /// The largest packets of QUIC, in bytes.
    pub mtu: Option<u16>,
    /// Other stores.
    pub peers: Vec<Peer>,
    /// Memory of the server.
    pub capacity_mib: u64,
}

/// What is measured.
enum Subject {
    Memcpy(Vec<bytes::Bytes>),
    Bare(Bare),
    PingPong(Bare),
    Tonic(pb::cache_client::CacheClient<tonic::transport::Channel>),
    Get(CacheClient, KeySpace, Vec<BlockHash>),
    Fetch(CacheClient, Run),
    View(CacheClient, Run),
    Put(CacheClient, KeySpace, Vec<Block>),
    Redis(Redis),
}

/// A subject, once for every client, and what came of its rounds.
struct Contender {
    name: String,
    subjects: Vec<Subject>,
    rounds: Vec<Round>,
}

#[derive(Clone, Debug)]
struct Round {
    gb_per_s: f64,
    /// Unknown for what runs elsewhere.
    cpu_s_per_gb: f64,
    times_us: Times,
}

/// Of requests.
#[derive(Clone, Debug)]
enum Times {
    /// Each.
    All(Vec<f64>),
    /// Told by another program.
    Known { p50: f64, p99: f64 },
}

impl Times {
    fn p50(&self) -> f64 {
        match self {
            Self::All(times) => quantile(times, 0.5),
            Self::Known { p50, .. } => *p50,
        }
    }

    fn p99(&self) -> f64 {
        match self {
            Self::All(times) => quantile(times, 0.99),
            Self::Known { p99, .. } => *p99,
        }
    }
}

/// One table's size.
#[derive(Clone, Copy, Debug)]
struct Shape {
    block_kib: u32,
    batch: usize,
    clients: usize,
}

/// What each is held against.
const LIMITS: [(&str, &str); 14] = [
    ("quic fetch", "bare quinn"),
    ("tls fetch", "bare tls"),
    ("grpc fetch", "bare tonic"),
    ("shm fetch", "memcpy"),
    ("shm get", "memcpy"),
    ("shm put", "memcpy"),
    ("shm view", PING_PONG),
    ("quic get", "bare quinn"),
    ("quic put", "bare quinn"),
    ("tls get", "bare tls"),
    ("tls put", "bare tls"),
    ("grpc get", "bare tonic"),
    ("grpc put", "bare tonic"),
    ("bare quinn", "raw tcp"),
];

/// These carry no bytes of blocks: their time counts.
const PING_PONG: &str = "unix ping-pong";
const VIEW: &str = "shm view";

fn space(block_kib: u32) -> Result<KeySpace, BenchError> {
    // 2 KiB a layer: 2 × 16 tokens × 1 head × 32 elements × 2 bytes.
    let layout = Layout::new(block_kib / 2, 1, 32, 16).or_fail("a block size in KiB, even and above 0")?;
    KeySpace::new(SpaceParts::new("bench", [0; 32], Dtype::Bf16, layout)).or_fail("a key space")
}

fn names(space: &KeySpace, count: usize, seed: u32) -> Vec<BlockHash> {
    // All blocks follow the first, whose first token is the seed.
    let tokens: Vec<u32> = std::iter::once(seed).chain(1..16 * count as u32).collect();
    chain(space, &tokens, |_| &[])
}

fn block(space: &KeySpace, hash: BlockHash) -> Block {
    let bytes: Vec<u8> = (0..space.block_bytes()).map(|i| (i * 31 % 251) as u8 ^ hash.0[0]).collect();
    Block { hash, checksum: Checksum::of(&space.id(), &hash, &bytes), bytes: bytes.into() }
}

fn all_hit(fetched: &cairn_client::Fetched) -> Result<(), BenchError> {
    let missed = fetched.outcomes.iter().find(|outcome| !outcome.is_hit());
    missed.map_or(Ok(()), |missed| Err(BenchError(format!("a block did not arrive: {missed}"))))
}

impl Subject {
    /// One request; returns how long it took, without what belongs to the bench.
    async fn once(&mut self, targets: &mut [Vec<u8>]) -> Result<Duration, BenchError> {
        let bytes: usize = targets.iter().map(Vec::len).sum();
        let started = Instant::now();
        match self {
            Self::Memcpy(source) => {
                for (target, source) in targets.iter_mut().zip(source) {
                    black_box(target).copy_from_slice(black_box(source));
                }
            }
            Self::Bare(bare) => bare.get(targets).await?,
            Self::PingPong(bare) => bare.get(&mut [vec![0; 64]]).await?,
            Self::Tonic(client) => wire::tonic_get(client, bytes).await?,
            Self::Get(client, space, names) => {
                let run = client.lookup(space, names).await.run.or_fail("the blocks are no longer there")?;
                all_hit(&client.fetch(&run, 0, targets).await)?;
            }
            Self::Fetch(client, run) => all_hit(&client.fetch(run, 0, targets).await)?,
            Self::View(client, run) => {
                let view = client.fetch_view(run, 0, targets.len()).await;
                if view.wire() != Some(WireKind::Shm) {
                    return Err(BenchError("shared memory did not work".into()));
                }
                black_box(&view);
            }
            Self::Put(client, space, blocks) => {
                let seed = NEXT_NAME.fetch_add(1, Ordering::Relaxed);
                // The same bytes under fresh names.
                let fresh: Vec<Block> = names(space, blocks.len(), seed)
                    .into_iter()
                    .zip(blocks.iter())
                    .map(|(hash, block)| {
                        let checksum = Checksum::of(&space.id(), &hash, &block.bytes);
                        Block { hash, checksum, bytes: block.bytes.clone() }
                    })
                    .collect();
                let started = Instant::now();
                let stored = client.publish(space, None, &fresh).await;
                if let Some(refused) = stored.iter().find(|stored| !matches!(stored, Stored::Committed)) {
                    return Err(BenchError(format!("a block was not stored: {refused:?}")));
                }
                return Ok(started.elapsed());
            }
            Self::Redis(redis) => redis.get(targets).await?,
        }
        Ok(started.elapsed())
    }

    /// Leases end; a run that is kept for long is looked up again.
    async fn renew(&mut self, space: &KeySpace, names: &[BlockHash]) -> Result<(), BenchError> {
        if let Self::Fetch(client, run) | Self::View(client, run) = self {
            *run = client.lookup(space, names).await.run.or_fail("the blocks are no longer there")?;
        }
        Ok(())
    }

    /// Other processes do part of the work.
    fn is_elsewhere(&self) -> bool {
        matches!(self, Self::Redis(_))
    }

    /// The bytes are those of [`block`].
    fn brings_blocks(&self) -> bool {
        matches!(self, Self::Get(..) | Self::Fetch(..) | Self::Memcpy(_))
    }
}

/// All clients at once, for a while.
async fn measure(
    subjects: &mut Vec<Subject>,
    memory: &mut Vec<Vec<Vec<u8>>>,
    seconds: f64,
) -> Result<Round, BenchError> {
    let elsewhere = subjects.iter().any(Subject::is_elsewhere);
    let (cpu, started) = (cpu_seconds(), Instant::now());
    let mut tasks = Vec::new();
    for (mut subject, mut targets) in subjects.drain(..).zip(memory.drain(..)) {
        tasks.push(tokio::spawn(async move {
            let mut times = Vec::new();
            loop {
                times.push(subject.once(&mut targets).await?.as_secs_f64());
                let wall = started.elapsed().as_secs_f64();
                if wall > seconds {
                    return Ok::<_, BenchError>((subject, targets, times, wall));
                }
                // Memcpy never waits for anything.
                tokio::task::yield_now().await;
            }
        }));
    }
    let (mut rate, mut gigabytes, mut times_us) = (0.0, 0.0, Vec::new());
    for task in tasks {
        let (subject, targets, times, wall) = task.await.or_fail("a client")??;
        let bytes: usize = targets.iter().map(Vec::len).sum();
        // Making fresh names is not part of a put.
        let seconds = if matches!(subject, Subject::Put(..)) { times.iter().sum() } else { wall };
        rate += bytes as f64 * times.len() as f64 / seconds / 1e9;
        gigabytes += bytes as f64 * times.len() as f64 / 1e9;
        times_us.extend(times.iter().map(|time| time * 1e6));
        subjects.push(subject);
        memory.push(targets);
    }
    let cpu_s_per_gb = if elsewhere { f64::NAN } else { (cpu_seconds() - cpu) / gigabytes };
    Ok(Round { gb_per_s: rate, cpu_s_per_gb, times_us: Times::All(times_us) })
}

/// A server, and clients of each wire.
struct Site {
    server: Server,
    tls: Tls,
    bare: Servers,
    servers: tokio::runtime::Handle,
}

impl Site {
    async fn start(options: Options) -> Result<Self, BenchError> {
        let tls = Tls::new()?;
        let mut config = Config::default();
        let any = ([127, 0, 0, 1], 0).into();
        config.server.listen = any;
        config.server.http_listen = any;
        config.wires.data_listen = Some(any);
        config.tls.cert_file = Some(tls.certs.server.0.clone());
        config.tls.key_file = Some(tls.certs.server.1.clone());
        config.wires.quic_max_mtu = options.mtu.unwrap_or(config.wires.quic_max_mtu);
        config.host.capacity_mib = options.capacity_mib;
        config.host.chunk_mib = config.host.chunk_mib.min(options.capacity_mib / 4).max(1);
        let server = Server::start(config).await.or_fail("a server")?;
        let bare = Servers::start(&tls, options.mtu.unwrap_or(MAX_MTU)).await?;
        Ok(Self { server, tls, bare, servers: tokio::runtime::Handle::current() })
    }

    fn client(&self, wire: WireKind, mtu: Option<u16>) -> Result<CacheClient, BenchError> {
        let mut options = ClientOptions::new(format!("https://{}", self.server.address()));
        options.security = Security { ca_file: Some(self.tls.certs.ca.clone()), ..Security::default() };
        options.wire = Some(wire);
        // A run is kept for a whole table.
        options.lease_ttl = LEASE;
        options.quic.max_mtu = mtu.unwrap_or(options.quic.max_mtu);
        CacheClient::start(options).or_fail("a client")
    }

    /// Everything to measure, each once for every client.
    async fn contenders(&self, options: &Options, shape: Shape) -> Result<Vec<Contender>, BenchError> {
        let space = space(shape.block_kib)?;
        let source: Vec<Block> =
            names(&space, shape.batch, 0).into_iter().map(|hash| block(&space, hash)).collect();
        let names: Vec<BlockHash> = source.iter().map(|block| block.hash).collect();
        let client = |wire| self.client(wire, options.mtu);
        client(WireKind::Shm)?.publish(&space, None, &source).await;
        let mut all: Vec<Contender> = Vec::new();
        for _ in 0..shape.clients {
            let mut add = |name: String, subject| match all.iter_mut().find(|one| one.name == name) {
                Some(one) => one.subjects.push(subject),
                None => all.push(Contender { name, subjects: vec![subject], rounds: Vec::new() }),
            };
            let copied = source.iter().map(|block| block.bytes.clone()).collect();
            add("memcpy".into(), Subject::Memcpy(copied));
            for (name, bare) in self.bare.connect().await? {
                add(name.into(), Subject::Bare(bare));
            }
            let unix = self.bare.connect().await?.into_iter().next().or_fail("a Unix socket")?;
            add(PING_PONG.into(), Subject::PingPong(unix.1));
            add("bare tonic".into(), Subject::Tonic(wire::bare_tonic(&self.tls, &self.servers).await?));
            for wire in WIRES {
                let client = client(wire)?;
                let run = client.lookup(&space, &names).await.run.or_fail("nothing was stored")?;
                if wire == WireKind::Shm {
                    let view = client.lookup(&space, &names).await.run.or_fail("nothing was stored")?;
                    add(VIEW.into(), Subject::View(client.clone(), view));
                }
                add(format!("{wire} fetch"), Subject::Fetch(client.clone(), run));
                add(format!("{wire} get"), Subject::Get(client.clone(), space.clone(), names.clone()));
                add(format!("{wire} put"), Subject::Put(client, space.clone(), source.clone()));
            }
            for peer in &options.peers {
                if let Peer::Redis { name, port } = peer {
                    let redis = Redis::connect(*port, space.block_bytes() as usize, shape.batch).await?;
                    add(format!("{name} get"), Subject::Redis(redis));
                }
            }
        }
        Ok(all)
    }
}

async fn table(site: &Site, options: &Options, shape: Shape) -> Result<Vec<Contender>, BenchError> {
    let mut contenders = site.contenders(options, shape).await?;
    let space = space(shape.block_kib)?;
    let all = names(&space, shape.batch, 0);
    let expected: Vec<Vec<u8>> = all.iter().map(|hash| block(&space, *hash).bytes.to_vec()).collect();
    let mut memory = vec![vec![vec![0u8; space.block_bytes() as usize]; shape.batch]; shape.clients];
    for _ in 0..options.rounds {
        for Contender { name, subjects, rounds } in &mut contenders {
            // So that every byte below came from this one.
            memory.iter_mut().flatten().for_each(|target| target.fill(0xEE));
            for subject in subjects.iter_mut() {
                subject.renew(&space, &all).await?;
            }
            // The first one is not counted: connections warm up, chunks are mapped.
            measure(subjects, &mut memory, options.seconds * WARM_UP).await?;
            rounds.push(measure(subjects, &mut memory, options.seconds).await?);
            let brings = subjects.iter().all(Subject::brings_blocks);
            if brings && memory.iter().any(|client| *client != expected) {
                return Err(BenchError(format!("{name}: wrong bytes arrived")));
            }
        }
    }
    for peer in &options.peers {
        if let Peer::Script { kind, python } = peer {
            let bytes = space.block_bytes() as usize;
            let seconds = options.seconds * options.rounds as f64;
            let modes = match run_script(*kind, python, (bytes, shape.batch, shape.clients), seconds).await {
                Ok(modes) => modes,
                Err(error) => {
                    // It must not take the others with it.
                    tracing::warn!(%error, "a peer is left out");
                    continue;
                }
            };
            contenders.extend(modes.into_iter().map(|mode| {
                let times_us = Times::Known { p50: mode.p50_us, p99: mode.p99_us };
                let round = Round { gb_per_s: mode.gb_per_s, cpu_s_per_gb: f64::NAN, times_us };
                Contender { name: mode.name, subjects: Vec::new(), rounds: vec![round] }
            }));
        }
    }
    Ok(contenders)
}

fn columns() -> Vec<Column> {
    vec![
        Column::key("block KiB"),
        Column::key("batch"),
        Column::key("clients"),
        Column::key("what"),
        Column::new("GB/s", Role::Higher, 2),
        Column::new("p50 us", Role::Lower, 0),
        Column::new("p99 us", Role::Fact, 0),
        Column::new("CPU-s/GB", Role::Lower, 3),
        Column::new("share", Role::Fact, 2),
        Column::key("of"),
    ]
}

fn rows(contenders: &[Contender], shape: Shape) -> Vec<Vec<Cell>> {
    let row = |one: &Contender| {
        let of = LIMITS.iter().find(|(ours, _)| *ours == one.name);
        let limit = of.and_then(|(_, limit)| contenders.iter().find(|other| other.name == *limit));
        // Ratios within a round: the machine's speed changes between them.
        let shares: Vec<f64> = limit.map_or(Vec::new(), |limit| {
            let pairs = one.rounds.iter().zip(&limit.rounds);
            pairs
                .map(|(own, limit)| match one.name.as_str() {
                    VIEW => own.times_us.p50() / limit.times_us.p50(),
                    _ => own.gb_per_s / limit.gb_per_s,
                })
                .collect()
        });
        let all = |value: fn(&Round) -> f64| Cell::rounds(&one.rounds.iter().map(value).collect::<Vec<_>>());
        let no_bytes = [VIEW, PING_PONG].contains(&one.name.as_str());
        vec![
            Cell::Number(f64::from(shape.block_kib)),
            Cell::Number(shape.batch as f64),
            Cell::Number(shape.clients as f64),
            Cell::text(&one.name),
            if no_bytes { Cell::Nothing } else { all(|round| round.gb_per_s) },
            all(|round| round.times_us.p50()),
            all(|round| round.times_us.p99()),
            if no_bytes { Cell::Nothing } else { all(|round| round.cpu_s_per_gb) },
            Cell::rounds(&shares),
            of.map_or(Cell::Nothing, |(_, limit)| Cell::text(*limit)),
        ]
    };
    contenders.iter().map(row).collect()
}

/// GB/s of everything at one size, with a mark at each one's limit.
fn bars(contenders: &[Contender], shape: Shape) -> Plot {
    let rate =
        |one: &Contender| quantile(&one.rounds.iter().map(|round| round.gb_per_s).collect::<Vec<_>>(), 0.5);
    let bar = |one: &Contender| {
        let limit = LIMITS.iter().find(|(ours, _)| *ours == one.name);
        let limit = limit.and_then(|(_, limit)| contenders.iter().find(|other| other.name == *limit));
        Bar { name: one.name.clone(), parts: vec![rate(one)], limit: limit.map(rate) }
    };
    let Shape { block_kib, batch, clients } = shape;
    let shown = contenders.iter().filter(|one| ![VIEW, PING_PONG].contains(&one.name.as_str()));
    Plot::Bars(Bars {
        name: format!("{block_kib}x{batch}x{clients}"),
        title: format!("{block_kib} KiB, {batch} at a time, {clients} client(s)"),
        x: "GB/s".into(),
        parts: vec!["GB/s".into()],
        bars: shown.map(bar).collect(),
    })
}

/// Measures all shapes; the flag says whether none is missing. `servers` runs the far ends, so that whether both ends of a connection
/// share a thread is not chance.
///
/// # Errors
/// When anything does not work, or a byte is wrong.
pub async fn run(
    options: &Options,
    servers: &tokio::runtime::Handle,
    watch: &dyn Watch,
) -> Result<(Section, bool), BenchError> {
    let mut section = Section::new("transfer", "Block bytes over every wire", columns());
    section.notes = notes(options);
    let mut shapes = Vec::new();
    for block_kib in options.blocks_kib.iter().copied() {
        for batch in options.batches.iter().copied() {
            let with = |clients| Shape { block_kib, batch, clients };
            shapes.extend(options.clients.iter().copied().map(with));
        }
    }
    watch.begin(shapes.len());
    for shape in shapes {
        if watch.stopped() {
            return Ok((section, false));
        }
        watch.step(&format!("{} KiB × {}, {} client(s)", shape.block_kib, shape.batch, shape.clients));
        let site = servers.spawn(Site::start(options.clone())).await.or_fail("a server")??;
        let contenders = table(&site, options, shape).await?;
        section.rows.extend(rows(&contenders, shape));
        section.plots.push(bars(&contenders, shape));
        servers.spawn(site.server.shutdown()).await.or_fail("a server")?.or_fail("an orderly end")?;
    }
    Ok((section, true))
}

fn notes(options: &Options) -> Vec<String> {
    let mut notes = vec![
        format!(
            "Medians of {} interleaved rounds of {} s each; shares within a round. Both ends are in one process with threads of their own, over \
             loopback; TLS on every network wire; every block is verified.",
            options.rounds, options.seconds
        ),
        "get: lookup and fetch of the whole batch. view: the time until blocks can be read in place; its share is of the time of a ping-pong \
         over a Unix socket. CPU counts both ends, and for puts the names and checksums of new blocks, which are not in their rate. RDMA is not measured: an emulated device has no speed worth a number."
            .into(),
    ];
    if !options.peers.is_empty() {
        notes.push(
            "Other stores run in processes of their own, unencrypted and without verification. Redis is read by a bare client with one MGET, in the same rounds; the \
             others are driven by scripts after the rounds, once, for as long as all rounds together."
                .into(),
        );
    }
    notes
}
