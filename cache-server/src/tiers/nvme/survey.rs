//! Looking at a directory without a server: what is in it, whether it is whole, and putting right what can be.

use super::device::{Device, DeviceError, DeviceOptions, METADATA_BYTES};
use super::io::{Memory, Pages};
use super::pool::Pool;
use super::recover::{Dropped, read_segment};
use super::{KEY_BYTES, ReadError};
use cairn_core::{DeviceId, DiskPlace, Found, PAGE_BYTES, record_pages};
use cairn_proto::SpaceId;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Headers and summaries.
    Headers,
    /// Every payload is read and verified.
    Payloads,
    /// As before, and what is wrong is put right: bad records are erased, and segments without a summary get one.
    Repair,
}

/// What one space has in a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpaceSurvey {
    /// Its tenant.
    pub tenant: String,
    /// Records.
    pub blocks: u64,
    /// Their block bytes.
    pub bytes: u64,
}

/// What is in a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The directory.
    pub path: PathBuf,
    /// Bytes of one segment.
    pub segment_bytes: u64,
    /// Segment files.
    pub segments: u64,
    /// Those of them that hold records.
    pub used_segments: u64,
    /// Those of them that have a summary.
    pub sealed_segments: u64,
    /// Readable records by space.
    pub spaces: BTreeMap<SpaceId, SpaceSurvey>,
    /// Records that are not used, by reason.
    pub dropped: Dropped,
    /// Payloads verified.
    pub verified: u64,
    /// Payloads that are not what was written.
    pub corrupt: u64,
    /// Records erased, and segments that got a summary.
    pub repaired: u64,
}

/// Looks at a directory. Only [`Depth::Repair`] writes, and only that takes the directory's lock.
///
/// # Errors
/// When it is not a device of this release, is in use (repair only), or cannot be read.
pub async fn survey(
    path: &Path,
    keys: HashMap<String, [u8; KEY_BYTES]>,
    depth: Depth,
) -> Result<Survey, DeviceError> {
    let fail = |source| DeviceError::Io { path: path.to_owned(), source };
    let files = segment_files(path).map_err(fail)?;
    let last = files.iter().copied().max().map_or(0, |last| u64::from(last) + 1);
    let options = DeviceOptions {
        path: path.to_owned(),
        // More than the files that are there: nothing is beyond it, and so nothing is removed.
        capacity_bytes: u64::MAX - METADATA_BYTES,
        segment_bytes: 0,
        keys,
        read_only: depth != Depth::Repair,
    };
    let pool = Arc::new(Pool::start().map_err(fail)?);
    let device = Device::open_existing(&options, pool)?;
    let mut survey = Survey {
        path: path.to_owned(),
        segment_bytes: device.segment_bytes(),
        segments: files.len() as u64,
        ..Survey::default()
    };
    for number in 0..u32::try_from(last).unwrap_or(u32::MAX) {
        look_at(&device, number, depth, &mut survey).await.map_err(fail)?;
    }
    Ok(survey)
}

async fn look_at(device: &Device, number: u32, depth: Depth, survey: &mut Survey) -> io::Result<()> {
    let Some(segment) = read_segment(device, number).await? else { return Ok(()) };
    survey.used_segments += 1;
    survey.sealed_segments += u64::from(segment.sealed);
    survey.dropped.add(segment.dropped);
    let mut good = Vec::new();
    let all = segment.found.len();
    for found in segment.found {
        let place = DiskPlace {
            device: DeviceId(0),
            segment: number,
            generation: segment.generation,
            page: found.page,
        };
        if depth != Depth::Headers && !verify(device, &found, place, survey).await? {
            if depth == Depth::Repair {
                device.erase(place).await?;
                survey.repaired += 1;
            }
            continue;
        }
        let space = survey.spaces.entry(found.record.space).or_default();
        space.tenant = found.record.tenant.to_string();
        space.blocks += 1;
        space.bytes += found.record.block_bytes;
        good.push(found);
    }
    let changed = good.len() < all || !segment.sealed;
    // A summary without the records that only a missing key hides would lose them.
    let all_known = segment.dropped.unreadable == 0;
    if depth == Depth::Repair && changed && all_known && summary_fits(device, &good) {
        let pages = good.iter().map(|found| found.page).collect();
        device.seal_segment(number, segment.generation, pages).await?;
        survey.repaired += u64::from(!segment.sealed);
    }
    Ok(())
}

async fn verify(device: &Device, found: &Found, place: DiskPlace, survey: &mut Survey) -> io::Result<bool> {
    let memory = Memory::Pages(Pages::for_bytes(found.record.block_bytes));
    match device.read_record(&found.record, place, memory).await {
        Ok(_) => {
            survey.verified += 1;
            Ok(true)
        }
        Err(ReadError::Corrupt) => {
            survey.corrupt += 1;
            Ok(false)
        }
        // What cannot be read is no better than what is wrong.
        Err(ReadError::Io(_)) => {
            survey.corrupt += 1;
            Ok(false)
        }
    }
}

/// A summary goes behind the last record, if that leaves room.
fn summary_fits(device: &Device, good: &[Found]) -> bool {
    let end = good.iter().map(|found| found.page + record_pages(found.record.block_bytes)).max().unwrap_or(1);
    end + cairn_core::summary_pages(good.len()) <= (device.segment_bytes() / PAGE_BYTES) as u32
}

fn segment_files(path: &Path) -> io::Result<Vec<u32>> {
    let folder = path.join("segments");
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.strip_suffix(".seg")?.parse::<u32>().ok()));
    }
    Ok(numbers)
}
