//! The benchmark harness behind `cairn bench`: request traces, made or read; replays of them through the very policies of the server
//! and through the best that is possible; and reports.
//!
//! Nothing here talks to a server or prints to a terminal: that is the command's business.

#![forbid(unsafe_code)]

pub mod arrivals;
pub mod diff;
pub mod hit_rate;
mod kv_events;
mod opt;
mod plot;
pub mod report;
pub mod section;
pub mod trace;
pub mod workload;

pub use opt::Optimum;
