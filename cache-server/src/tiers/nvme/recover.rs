//! Reading back what a device holds. A sealed segment is known from its summary. One that was open when the server stopped, or
//! whose summary is damaged, is searched record by record, and every payload in it is verified: what was torn is dropped.

use super::device::Device;
use super::format::{FormatError, Header, Position};
use super::io::Pages;
use cairn_core::{Found, PAGE_BYTES, record_pages, summary_pages};
use cairn_proto::Checksum;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Pages read at a time while searching.
const SEARCH_PAGES: u32 = 256;

/// What one segment holds.
pub(crate) struct Segment {
    pub(crate) number: u32,
    pub(crate) generation: u64,
    /// It has a summary.
    pub(crate) sealed: bool,
    pub(crate) found: Vec<Found>,
    pub(crate) dropped: Dropped,
    /// The highest number of any record, used or not.
    pub(crate) last_sequence: u64,
}

/// Records that were found and are not used, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Their payload does not match.
    pub torn: u64,
    /// Their space was emptied by an administrator.
    pub forgotten: u64,
    /// Their tenant's key is not configured, or is another.
    pub unreadable: u64,
}

impl Dropped {
    /// Adds another count.
    pub fn add(&mut self, other: Self) {
        self.torn += other.torn;
        self.forgotten += other.forgotten;
        self.unreadable += other.unreadable;
    }
}

/// Reads one segment; `None` if nothing was ever written to it.
pub(crate) async fn read_segment(device: &Device, number: u32) -> io::Result<Option<Segment>> {
    let Some(file) = device.existing(number)? else { return Ok(None) };
    if file.metadata()?.len() < device.segment_bytes() {
        // Stopped while its room was taken: nothing can be in it yet.
        return Ok(None);
    }
    let first = device.read_pages(&file, 0, 1).await?;
    let generation = match device.key.read_segment(first.as_ref(), number) {
        Ok(generation) => generation,
        Err(FormatError::Version { what, found }) => {
            let text = format!("{what} of version {found} in segment {number}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Err(_) => return Ok(None),
    };
    let mut segment = Segment {
        number,
        generation,
        sealed: true,
        found: Vec::new(),
        dropped: Dropped::default(),
        last_sequence: 0,
    };
    // A summary that cannot be read is as good as none.
    let headers = match read_summary(device, &file, (number, generation)).await.unwrap_or(None) {
        Some(headers) => headers,
        None => {
            segment.sealed = false;
            search(device, &file, &mut segment).await
        }
    };
    for (page, header) in headers {
        let Header { mut record, seal } = header;
        segment.last_sequence = segment.last_sequence.max(record.sequence);
        let readable = match seal {
            None => true,
            Some(seal) => device.ciphers().open_record(&mut record, &seal).is_ok(),
        };
        if device.is_forgotten(&record) {
            segment.dropped.forgotten += 1;
        } else if !readable {
            segment.dropped.unreadable += 1;
        } else {
            segment.found.push(Found { page, record });
        }
    }
    Ok(Some(segment))
}

async fn read_summary(
    device: &Device,
    file: &Arc<File>,
    place: (u32, u64),
) -> io::Result<Option<Vec<(u32, Header)>>> {
    let last = device.segment_pages() - 1;
    let trailer = device.read_pages(file, last, 1).await?;
    let Ok((count, hash)) = device.key.read_trailer(trailer.as_ref(), place) else { return Ok(None) };
    let pages = summary_pages(count as usize) - 1;
    if pages >= last {
        return Ok(None);
    }
    let entries = match pages {
        0 => Pages::new(0),
        pages => device.read_pages(file, last - pages, pages as usize).await?,
    };
    Ok(device.key.read_entries(entries.as_ref(), (count, hash), place).ok())
}

/// Walks over all pages: from record to record where they follow each other, page by page where they do not.
async fn search(device: &Device, file: &Arc<File>, segment: &mut Segment) -> Vec<(u32, Header)> {
    let mut headers = Vec::new();
    let end = device.segment_pages();
    let mut window = (0, Pages::new(0));
    let mut page = 1;
    while page < end {
        let inside = page.checked_sub(window.0).map(|offset| offset as usize * PAGE_BYTES as usize);
        let bytes = match inside.filter(|start| *start < window.1.as_ref().len()) {
            Some(start) => &window.1.as_ref()[start..],
            None => {
                let count = SEARCH_PAGES.min(end - page);
                let Ok(pages) = device.read_pages(file, page, count as usize).await else {
                    // What cannot be read is lost; what is behind it need not be.
                    segment.dropped.torn += 1;
                    page += count;
                    continue;
                };
                window = (page, pages);
                window.1.as_ref()
            }
        };
        let position = Position { segment: segment.number, generation: segment.generation, page };
        let Ok(header) = device.key.read_record(bytes, position) else {
            page += 1;
            continue;
        };
        let pages = record_pages(header.record.block_bytes);
        if pages > end - page {
            page += 1;
            continue;
        }
        if payload_is_whole(device, file, (page, pages), &header).await.unwrap_or(false) {
            headers.push((page, header));
        } else {
            segment.dropped.torn += 1;
        }
        page += pages;
    }
    headers
}

async fn payload_is_whole(
    device: &Device,
    file: &Arc<File>,
    (page, pages): (u32, u32),
    header: &Header,
) -> io::Result<bool> {
    let count = pages - cairn_core::HEADER_PAGES;
    let mut payload = device.read_pages(file, page + cairn_core::HEADER_PAGES, count as usize).await?;
    let mut record = header.record.clone();
    let text = &mut payload.as_mut()[..record.block_bytes as usize];
    if let Some(seal) = &header.seal {
        if !device.ciphers().encrypts(&record.tenant) {
            // Nobody can tell; it is dropped for another reason.
            return Ok(true);
        }
        let sealed = record.clone();
        if device.ciphers().open_record(&mut record, seal).is_err() {
            // Another key: it is dropped for that.
            return Ok(true);
        }
        if device.ciphers().open_payload(&sealed, seal, text).is_err() {
            return Ok(false);
        }
    }
    Ok(Checksum::of(&record.space, &record.hash, text) == record.checksum)
}
