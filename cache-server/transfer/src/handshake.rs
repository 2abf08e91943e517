//! Both ends of a data connection prove that they know the key of the session that it is for: the key came over the
//! authenticated API, and never travels again. A process that only sits on the server's socket path learns nothing.

use crate::frame::{Link, kind};
use crate::store::{Hold, SessionKey, Store};
use cairn_proto::pb;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::Status;

/// Longest time to say why not.
const FAREWELL: Duration = Duration::from_secs(1);

const NONCE_BYTES: usize = 32;

fn nonce() -> Result<[u8; NONCE_BYTES], Status> {
    let mut nonce = [0; NONCE_BYTES];
    let read = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty());
    match read {
        Ok(NONCE_BYTES) => Ok(nonce),
        _ => Err(Status::internal("the system gives no random bytes")),
    }
}

fn proof(key: &SessionKey, role: &[u8], client: &[u8], server: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(role).update(client).update(server);
    hasher.finalize()
}

/// In constant time.
fn check(expected: blake3::Hash, bytes: &[u8]) -> Result<(), Status> {
    let found: [u8; 32] = bytes.try_into().map_err(|_| Status::unauthenticated("a malformed proof"))?;
    // `blake3::Hash` compares in constant time.
    if expected == blake3::Hash::from_bytes(found) {
        return Ok(());
    }
    Err(Status::unauthenticated("the other side does not know the session's key"))
}

/// The client's side.
pub(crate) async fn open<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    session: u64,
    key: &SessionKey,
) -> Result<(), Status> {
    let ours = nonce()?;
    link.send(kind::HELLO, &pb::DataHello { session_id: session, nonce: ours.to_vec().into() }).await?;
    let welcome: pb::DataWelcome = link.answer().await?.of_kind(kind::WELCOME)?;
    check(proof(key, b"server", &ours, &welcome.nonce), &welcome.proof)?;
    let proof = proof(key, b"client", &ours, &welcome.nonce).as_bytes().to_vec().into();
    link.send(kind::PROOF, &pb::DataProof { proof }).await?;
    link.answer().await?.of_kind::<()>(kind::READY)
}

/// The server's side: the session that the client is for, and its place among the session's connections.
pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    store: &dyn Store,
) -> Result<(u64, Hold), Status> {
    let work = async {
        let hello: pb::DataHello = link.answer().await?.of_kind(kind::HELLO)?;
        if hello.nonce.len() != NONCE_BYTES {
            return Err(Status::invalid_argument("a nonce has 32 bytes"));
        }
        let (key, hold) = store.connect(hello.session_id)?;
        let ours = nonce()?;
        let shown = proof(&key, b"server", &hello.nonce, &ours).as_bytes().to_vec().into();
        link.send(kind::WELCOME, &pb::DataWelcome { nonce: ours.to_vec().into(), proof: shown }).await?;
        let answer: pb::DataProof = link.answer().await?.of_kind(kind::PROOF)?;
        check(proof(&key, b"client", &hello.nonce, &ours), &answer.proof)?;
        link.send(kind::READY, &()).await?;
        Ok((hello.session_id, hold))
    };
    let result = match tokio::time::timeout(store.limits().handshake_timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(Status::deadline_exceeded("the handshake took too long")),
    };
    if let Err(status) = &result {
        // The other side may be gone already, or not want to hear.
        let _ = tokio::time::timeout(FAREWELL, link.fail(status)).await;
    }
    link.trust();
    result
}
