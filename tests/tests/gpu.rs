//! CUDA without a card: the device, its kernels and their launches over emulated libraries, and hosts that lack something.

#![allow(clippy::unwrap_used)]

use cairn_tests::emulator::emulator;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// An emulated device takes a core, and what is beside it has deadlines: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn check(arguments: &[&str], settings: &[(&str, &str)]) -> Option<Output> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = emulator(env!("CARGO_TARGET_TMPDIR").as_ref())?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu-check"));
    command.args(arguments).env("LD_LIBRARY_PATH", &folder).arg("--kernel-cache").arg(folder.join("kernels"));
    for (name, value) in settings {
        command.env(name, value);
    }
    Some(command.output().unwrap())
}

fn passes(arguments: &[&str], settings: &[(&str, &str)]) {
    let Some(output) = check(arguments, settings) else { return };
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{arguments:?} {settings:?}: {}\n{text}", output.status);
    println!("{text}");
}

#[test]
fn the_device_conforms() {
    for seed in ["1", "2", "3"] {
        passes(&["conformance"], &[("CAIRN_EMULATOR_SEED", seed)]);
    }
    passes(&["conformance"], &[("CAIRN_EMULATOR_OLD", "1")]);
}

#[test]
fn kernels_agree_with_their_references() {
    passes(&["kernels", "--cases", "12", "--seed", "1"], &[]);
}

#[test]
fn memory_is_shared_with_processes_mappings_and_cards() {
    passes(&["sharing"], &[("CAIRN_EMULATOR_DEVICES", "2")]);
}

#[test]
fn tokens_are_those_of_the_cpu_and_the_same_through_a_cache() {
    passes(&["tokens"], &[("CAIRN_EMULATOR_SEED", "4")]);
    passes(&["tokens"], &[("CAIRN_EMULATOR_SEED", "5"), ("CAIRN_EMULATOR_OLD", "1")]);
    passes(&["full"], &[("CAIRN_EMULATOR_MIB", "256")]);
}

#[test]
fn a_lost_device_is_said_and_nothing_waits_for_it() {
    for operations in ["10", "40", "300"] {
        passes(&["lost"], &[("CAIRN_EMULATOR_LOSE_AFTER", operations)]);
    }
    passes(&["lost-worker"], &[("CAIRN_EMULATOR_LOSE_AFTER", "2000")]);
}

#[test]
fn a_cache_server_keeps_blocks_on_the_gpu() {
    passes(&["tier"], &[("CAIRN_EMULATOR_SEED", "6")]);
    passes(&["tier"], &[("CAIRN_EMULATOR_SEED", "7"), ("CAIRN_EMULATOR_PINS", "0")]);
    for operations in ["2", "4"] {
        passes(&["lost-tier", "--lose-after", operations], &[]);
    }
}

#[test]
fn the_first_token_can_be_timed_from_every_tier() {
    passes(&["first-token", "--disk", env!("CARGO_TARGET_TMPDIR")], &[]);
}

#[test]
fn a_driver_without_a_card_is_said() {
    let Some(output) = check(&["probe"], &[("CAIRN_EMULATOR_DEVICES", "0")]) else { return };
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stdout).contains("libcuda is here, but no device"));
}

#[test]
fn no_driver_is_said() {
    if std::path::Path::new("/proc/driver/nvidia").exists() {
        return println!("SKIPPED: this host has an NVIDIA driver");
    }
    let output =
        Command::new(env!("CARGO_BIN_EXE_gpu-check")).env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stdout).contains("no libcuda"));
}
