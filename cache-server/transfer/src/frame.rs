//! Frames of a data connection (`data.proto` lists them), on any byte stream. Bytes of blocks are read straight into the place
//! where they belong and written straight from where they are.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use cairn_proto::{limits, pb};
use prost::Message;
use std::collections::VecDeque;
use std::io::IoSlice;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tonic::{Code, Status};

/// Kinds of frames.
pub(crate) mod kind {
    pub(crate) const HELLO: u8 = 1;
    pub(crate) const WELCOME: u8 = 2;
    pub(crate) const PROOF: u8 = 3;
    pub(crate) const READY: u8 = 4;
    pub(crate) const FAILED: u8 = 5;
    pub(crate) const FETCH: u8 = 10;
    pub(crate) const PIECE: u8 = 11;
    pub(crate) const LOST: u8 = 12;
    pub(crate) const END: u8 = 13;
    pub(crate) const READ: u8 = 14;
    pub(crate) const LANES: u8 = 15;
    pub(crate) const PUBLISH: u8 = 20;
    pub(crate) const SEAL: u8 = 21;
    pub(crate) const COMMITS: u8 = 22;
    pub(crate) const LOOKUP: u8 = 30;
    pub(crate) const FOUND: u8 = 31;
    pub(crate) const LOCATED: u8 = 32;
    pub(crate) const MAP: u8 = 33;
    pub(crate) const MAPPED: u8 = 34;
    pub(crate) const PIN: u8 = 35;
    pub(crate) const UNPIN: u8 = 36;
    pub(crate) const STAGING: u8 = 37;
    pub(crate) const STAGED: u8 = 38;
    pub(crate) const OFFER: u8 = 39;
    pub(crate) const TAKEN: u8 = 40;
    pub(crate) const RESERVE: u8 = 41;
    pub(crate) const RESERVED: u8 = 42;
    pub(crate) const OPEN: u8 = 45;
    pub(crate) const OPENED: u8 = 46;
    pub(crate) const QUEUE_PAIR: u8 = 43;
    #[cfg(feature = "rdma")]
    pub(crate) const QUEUE_PAIR_AT: u8 = 44;
}

const HEAD_BYTES: usize = 5;
const PIECE_HEAD_BYTES: usize = 12;

/// Written at once when this many bytes wait.
const FLUSH_BYTES: usize = 256 << 10;

/// Read from the stream at once; larger reads go straight to their place.
const READ_BUFFER_BYTES: usize = 8 << 10;

/// Longest frame of a handshake.
const STRANGER_BODY_BYTES: usize = 256;

/// Segments in one system call.
const MAX_SEGMENTS: usize = 64;

/// One frame. The bytes of a piece are still in the stream.
#[derive(Debug)]
pub(crate) enum Frame {
    Piece { block: u32, offset: u64, len: usize },
    Message(u8, Bytes),
}

impl Frame {
    /// The body of a frame that must be of this kind; a failure becomes its status.
    pub(crate) fn of_kind<M: Message + Default>(self, wanted: u8) -> Result<M, Status> {
        match self {
            Self::Message(kind, body) if kind == wanted => decode(body),
            other => Err(other.unexpected()),
        }
    }

    pub(crate) fn unexpected(self) -> Status {
        match self {
            Self::Message(kind::FAILED, body) => match decode::<pb::DataFailure>(body) {
                Ok(failure) => Status::new(Code::from_i32(failure.code), failure.message),
                Err(status) => status,
            },
            Self::Message(kind, _) => nonsense(format!("a frame of kind {kind} was not expected")),
            Self::Piece { .. } => nonsense("a piece of a block was not expected"),
        }
    }
}

pub(crate) fn decode<M: Message + Default>(body: Bytes) -> Result<M, Status> {
    M::decode(body).map_err(|error| nonsense(format!("a frame cannot be read: {error}")))
}

/// The other side does not keep to the protocol: this connection is of no use any more, to either end.
pub(crate) fn nonsense(what: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the other side of a data connection makes no sense: {what}"))
}

fn broken(error: std::io::Error) -> Status {
    Status::unavailable(format!("the data connection broke: {error}"))
}

/// Bytes that wait to be written, as they lie in memory.
#[derive(Default)]
struct Segments(VecDeque<Bytes>);

impl Buf for Segments {
    fn remaining(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.0.front().map_or(&[], |segment| segment)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pairs = slices.iter_mut().zip(&self.0);
        pairs.map(|(slice, segment)| *slice = IoSlice::new(segment)).count()
    }

    fn advance(&mut self, mut count: usize) {
        while count > 0 {
            let Some(front) = self.0.front_mut() else { return };
            let part = count.min(front.len());
            front.advance(part);
            count -= part;
            if front.is_empty() {
                self.0.pop_front();
            }
        }
    }
}

/// One end of a data connection.
pub(crate) struct Link<S> {
    io: BufReader<S>,
    segments: Segments,
    waiting: usize,
    /// Longest body that is taken.
    max_body: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    pub(crate) fn new(io: S) -> Self {
        let io = BufReader::with_capacity(READ_BUFFER_BYTES, io);
        Self { io, segments: Segments::default(), waiting: 0, max_body: limits::MAX_MESSAGE_BYTES }
    }

    /// An end that does not know yet who is at the other one: it takes short frames only.
    pub(crate) fn with_a_stranger(io: S) -> Self {
        Self { max_body: STRANGER_BODY_BYTES, ..Self::new(io) }
    }

    /// The other side proved who it is.
    pub(crate) fn trust(&mut self) {
        self.max_body = limits::MAX_MESSAGE_BYTES;
    }

    /// The next frame, however long it takes to come; once it began it must be complete in time.
    pub(crate) async fn request(&mut self, idle: Duration) -> Result<Option<Frame>, Status> {
        if self.io.fill_buf().await.map_err(broken)?.is_empty() {
            return Ok(None);
        }
        match tokio::time::timeout(idle, self.next()).await {
            Ok(frame) => frame,
            Err(_) => Err(nonsense("a frame that does not end")),
        }
    }

    /// The stream under it.
    pub(crate) fn io(&mut self) -> &mut S {
        self.io.get_mut()
    }

    /// The next frame; `None` when the other side closed the connection between two.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, Status> {
        let mut head = [0; HEAD_BYTES];
        let first = self.io.read(&mut head).await.map_err(broken)?;
        if first == 0 {
            return Ok(None);
        }
        self.io.read_exact(&mut head[first..]).await.map_err(broken)?;
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if len > self.max_body {
            return Err(nonsense(format!("a frame of {len} bytes")));
        }
        if head[4] != kind::PIECE {
            let mut body = BytesMut::with_capacity(len.min(READ_BUFFER_BYTES));
            while body.len() < len {
                let room = len - body.len();
                let read = self.io.read_buf(&mut (&mut body).limit(room)).await.map_err(broken)?;
                if read == 0 {
                    return Err(Status::unavailable("the data connection ended in the middle of a frame"));
                }
            }
            return Ok(Some(Frame::Message(head[4], body.freeze())));
        }
        let mut piece = [0; PIECE_HEAD_BYTES];
        if len < PIECE_HEAD_BYTES {
            return Err(nonsense("a piece without a place"));
        }
        self.io.read_exact(&mut piece).await.map_err(broken)?;
        let mut piece = &piece[..];
        let (block, offset) = (piece.get_u32_le(), piece.get_u64_le());
        Ok(Some(Frame::Piece { block, offset, len: len - PIECE_HEAD_BYTES }))
    }

    /// The next frame of a request that is not over.
    pub(crate) async fn answer(&mut self) -> Result<Frame, Status> {
        self.next().await?.ok_or_else(|| Status::unavailable("the data connection was closed"))
    }

    /// The bytes of a piece.
    pub(crate) async fn fill(&mut self, target: &mut [u8]) -> Result<(), Status> {
        self.io.read_exact(target).await.map_err(broken)?;
        Ok(())
    }

    /// Until the other side is gone, whatever it still says.
    pub(crate) async fn closed(&mut self) {
        while let Ok(bytes) = self.io.fill_buf().await {
            let count = bytes.len();
            if count == 0 {
                return;
            }
            self.io.consume(count);
        }
    }

    /// Queues a frame.
    pub(crate) fn push(&mut self, kind: u8, message: &impl Message) {
        let len = message.encoded_len();
        let mut frame = BytesMut::with_capacity(HEAD_BYTES + len);
        frame.put_u32_le(len as u32);
        frame.put_u8(kind);
        // Fails only for want of room.
        let _ = message.encode(&mut frame);
        self.waiting += frame.len();
        self.segments.0.push_back(frame.freeze());
    }

    /// Queues a piece; writes when enough waits.
    pub(crate) async fn piece(&mut self, block: u32, offset: u64, data: Bytes) -> Result<(), Status> {
        let mut head = BytesMut::with_capacity(HEAD_BYTES + PIECE_HEAD_BYTES);
        head.put_u32_le((PIECE_HEAD_BYTES + data.len()) as u32);
        head.put_u8(kind::PIECE);
        head.put_u32_le(block);
        head.put_u64_le(offset);
        self.waiting += head.len() + data.len();
        self.segments.0.push_back(head.freeze());
        self.segments.0.push_back(data);
        if self.waiting >= FLUSH_BYTES || self.segments.0.len() >= MAX_SEGMENTS {
            self.write().await?;
        }
        Ok(())
    }

    async fn write(&mut self) -> Result<(), Status> {
        self.waiting = 0;
        self.io.write_all_buf(&mut self.segments).await.map_err(broken)
    }

    /// Writes what waits.
    pub(crate) async fn flush(&mut self) -> Result<(), Status> {
        self.write().await?;
        self.io.flush().await.map_err(broken)
    }

    /// Sends a frame at once.
    pub(crate) async fn send(&mut self, kind: u8, message: &impl Message) -> Result<(), Status> {
        self.push(kind, message);
        self.flush().await
    }

    /// Tells the other side why a request failed.
    pub(crate) async fn fail(&mut self, status: &Status) -> Result<(), Status> {
        let message = status.message().to_owned();
        self.send(kind::FAILED, &pb::DataFailure { code: status.code().into(), message }).await
    }
}
