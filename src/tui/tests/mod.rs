//! Tests of the workbench as a whole: key scripts, snapshots of the screen, the real loop.

mod allocation;
mod fixture;
mod key_scripts;
mod real_loop;
mod running;
mod snapshots;
