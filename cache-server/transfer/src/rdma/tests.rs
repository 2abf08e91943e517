//! What a key opens and what not, on a device. Skipped visibly where there is none.

#![allow(clippy::unwrap_used)]

use super::TICKET_BYTES;
use super::registered::*;
use super::verbs::*;
use crate::map::{Map, memory};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

const BYTES: u64 = 1 << 20;

/// An address of an RDMA device that tests may use.
fn address() -> Option<IpAddr> {
    let text = std::env::vars().find(|(name, _)| name == "CAIRN_RDMA")?.1;
    text.split(',').next()?.parse().ok()
}

struct Memory {
    map: Arc<Map>,
    region: Arc<Region>,
}

fn registered(domain: &Arc<Domain>, access: Access, byte: u8) -> Memory {
    let fd = memory(c"cairn-rdma-test", BYTES).unwrap();
    let map = Arc::new(Map::writable(fd, BYTES).unwrap());
    map.write(0, &vec![byte; BYTES as usize]).unwrap();
    // SAFETY: the hold is the mapping, reached by pointer only.
    let region = unsafe { Region::new(domain, (map.address(), BYTES), access, map.clone()) };
    Memory { map, region: Arc::new(region.unwrap()) }
}

fn byte(memory: &Memory, at: u64) -> u8 {
    // SAFETY: inside the mapping; nothing writes to it at that time.
    unsafe { memory.map.at(at, 1).unwrap().read_volatile() }
}

/// Both ends of a connection, each in a domain of its own.
async fn pair(listener: &Listener) -> (Queue, Queue) {
    let address = address().unwrap();
    let ticket = [7; TICKET_BYTES];
    let passive = async {
        let request = listener.request().await.unwrap();
        assert_eq!(request.ticket, ticket);
        request.accept(|end| end.domain().map(Arc::new)).unwrap()
    };
    let active = Queue::connect((address, listener.port()).into(), ticket);
    let (active, passive) = tokio::join!(active, passive);
    (active.unwrap(), passive)
}

async fn moved(queue: &mut Queue, buffer: &Memory, piece: Piece) -> io::Result<()> {
    queue.post(&buffer.region, &[piece], 1)?;
    let done = tokio::time::timeout(Duration::from_secs(60), queue.done()).await;
    assert_eq!(done.expect("the device answers in time")?, 1);
    Ok(())
}

fn piece(way: Way, memory: &Memory, remote: u64) -> Piece {
    Piece { way, local: 4096, remote, len: 8192, rkey: memory.region.rkey() }
}

/// What a key opens: this memory, in this domain, for what it was made for, and as long as it is registered.
#[tokio::test(flavor = "multi_thread")]
async fn keys_open_no_more_than_they_should() {
    let Some(address) = address() else {
        println!("SKIPPED: no RDMA device (CAIRN_RDMA names an address of one)");
        return;
    };
    let listener = Listener::bind((address, 0).into()).unwrap();
    let mut works = Vec::new();
    for case in
        ["read", "write", "read of writable", "write to readable", "outside", "another domain", "gone"]
    {
        let (mut client, server) = pair(&listener).await;
        let buffer = registered(client.domain(), Access::Local, 1);
        let readable = registered(server.domain(), Access::RemoteRead, 2);
        let writable = registered(server.domain(), Access::RemoteWrite, 3);
        let (stranger, elsewhere) = pair(&listener).await;
        let foreign = registered(elsewhere.domain(), Access::RemoteRead, 4);
        let request = match case {
            "read" => piece(Way::Read, &readable, 8192),
            "write" => piece(Way::Write, &writable, 0),
            "read of writable" => piece(Way::Read, &writable, 0),
            "write to readable" => piece(Way::Write, &readable, 0),
            "outside" => piece(Way::Read, &readable, BYTES - 4096),
            "another domain" => piece(Way::Read, &foreign, 0),
            _ => piece(Way::Read, &readable, 0),
        };
        let (mut readable, server) = (Some(readable), server);
        if case == "gone" {
            // As a chunk that got other memory.
            readable = None;
        }
        let result = moved(&mut client, &buffer, request).await;
        println!("{case}: {result:?}");
        if result.is_ok() {
            works.push(case);
        }
        match case {
            "read" => {
                assert_eq!([byte(&buffer, 4095), byte(&buffer, 4096), byte(&buffer, 12_287)], [1, 2, 2])
            }
            "write" => assert_eq!([byte(&writable, 0), byte(&writable, 8192)], [1, 3]),
            "write to readable" => {
                assert_eq!(readable.as_ref().map(|memory| byte(memory, 0)), Some(2));
            }
            "another domain" | "gone" => assert_eq!(byte(&buffer, 4096), 1),
            _ => {}
        }
        drop((client, server, stranger, elsewhere));
    }
    assert_eq!(works, ["read", "write", "read of writable"]);
}

/// Who is refused hears of it; who is let in and leaves takes nothing with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_an_error() {
    let Some(address) = address() else {
        println!("SKIPPED: no RDMA device (CAIRN_RDMA names an address of one)");
        return;
    };
    let listener = Listener::bind((address, 0).into()).unwrap();
    let refuse = async { listener.request().await.unwrap().refuse() };
    let ticket = [1; TICKET_BYTES];
    let call = Queue::connect((address, listener.port()).into(), ticket);
    let (called, ()) = tokio::join!(call, refuse);
    let error = called.err().unwrap().to_string();
    assert!(error.contains("REJECTED"), "{error}");
    let nobody = Queue::connect((address, 1).into(), ticket).await.err().unwrap();
    println!("nobody listens: {nobody}");
    let (client, server) = pair(&listener).await;
    drop(server);
    drop(client);
}

#[tokio::test]
async fn batches_that_do_not_fit_are_refused_here() {
    let Some(address) = address() else {
        println!("SKIPPED: no RDMA device (CAIRN_RDMA names an address of one)");
        return;
    };
    let listener = Listener::bind((address, 0).into()).unwrap();
    let (mut client, _server) = pair(&listener).await;
    let buffer = registered(client.domain(), Access::Local, 1);
    let long = Piece { local: BYTES - 1, ..piece(Way::Read, &buffer, 0) };
    assert!(client.post(&buffer.region, &[long], 1).is_err());
    assert!(client.post(&buffer.region, &[], 1).is_err());
    let many = vec![piece(Way::Read, &buffer, 0); MAX_PIECES + 2];
    assert!(client.post(&buffer.region, &many, 1).is_err());
}
