//! Blocks that go bad in the memory of a server.

use std::os::unix::fs::FileExt;

/// Flips one bit of the block that starts with these bytes, in whichever chunk of the server's memory holds it. The memory files are
/// sealed against writing, so it goes through the mapping of a server in this process.
///
/// # Panics
/// When no server here has the block, or it is shorter than four pages.
pub fn corrupt_in_memory(block: &[u8]) {
    let memory = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/mem")
        .expect("this process's memory");
    for line in std::fs::read_to_string("/proc/self/maps").expect("this process's memory").lines() {
        if !line.contains("cairn-host-chunk") || !line.contains("rw-s") {
            continue;
        }
        let (start, end) = line
            .split(' ')
            .next()
            .expect("this process's memory")
            .split_once('-')
            .expect("this process's memory");
        let (start, end) = (
            u64::from_str_radix(start, 16).expect("this process's memory"),
            u64::from_str_radix(end, 16).expect("this process's memory"),
        );
        let mut content = vec![0; (end - start) as usize];
        memory.read_exact_at(&mut content, start).expect("this process's memory");
        let Some(at) = content.chunks(4096).position(|page| page.starts_with(&block[..64])) else { continue };
        let at = at * 4096 + 12_345;
        assert!(at < content.len(), "the block is too short");
        memory.write_all_at(&[content[at] ^ 0x10], start + at as u64).expect("this process's memory");
        return;
    }
    panic!("the block is in no memory of the server");
}
