//! Runs through the real loop with the real engine: pause, order, cancel, try again, and what is written down of them.

use super::real_loop::{Typist, small_session, with_loop};
use crate::session::runs::{Run, State as RunState};
use crate::session::{Session, VariantSpec};
use crate::tui::queue::Status;

/// Each variant takes a second or two.
fn session() -> Session {
    let mut session = small_session();
    (session.calibration.sequences, session.calibration.length) = (4, 128);
    session
}

#[test]
fn runs_are_paused_put_in_another_order_cancelled_and_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let state = with_loop(session(), folder.path(), async |typist: Typist| {
        typist.press(&["R"]);
        typist.sees("quantize      ").await;
        typist.press(&["p"]);
        typist.sees("%  paused").await;
        let still = typist.text();
        // Two more runs wait: phase2, then phase1 once more; the later goes before the earlier, which is dropped.
        typist.press(&["]", "R", "]", "R"]);
        typist.sees("▶· run phase1  waits").await;
        typist.press(&["K", "j", "x"]);
        typist.sees("Cancel phase2?").await;
        typist.press(&["y"]);
        typist.sees("run phase2  cancelled; r tries again").await;
        let bar =
            |text: &str| text.lines().find(|line| line.contains("whole job")).map(|line| line[line.find("whole").unwrap()..].to_owned());
        assert_eq!(bar(&typist.text()), bar(&still), "nothing moves while everything is paused");
        typist.press(&["r"]);
        typist.sees("run phase2  waits").await;
        typist.press(&["p"]);
        typist.sees("✓ run phase2  done").await;
        typist.press(&["q"]);
    });
    let titles: Vec<&str> = state.queue.runs.iter().map(|run| run.title.as_str()).collect();
    assert_eq!(titles, ["phase1", "phase1", "phase2"]);
    assert!(state.queue.runs.iter().all(|run| *run.status() == Status::Done));
    assert!(state.queue.runs[1].steps[0].reused, "what is on disk is not made again");

    // On disk: the four runs that were asked for, the newest first.
    let runs = Run::list(&folder.path().join("data/runs"));
    let mut states: Vec<(&str, RunState)> = runs.iter().map(|run| (run.title.as_str(), run.state)).collect();
    states.sort_by_key(|(title, state)| (*title, state.name()));
    let done = RunState::Done;
    assert_eq!(states, [("phase1", done), ("phase1", done), ("phase2", RunState::Cancelled), ("phase2", done)]);
}

#[test]
fn results_are_there_at_once_when_the_session_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let run = async |typist: Typist| {
        typist.press(&["A"]);
        typist.sees("✓ evaluate base, phase1, phase2").await;
        typist.press(&["q"]);
    };
    let first = with_loop(small_session(), folder.path(), run);
    let second = with_loop(small_session(), folder.path(), async |typist: Typist| {
        typist.sees("against base").await;
        typist.press(&["q"]);
    });
    assert_eq!(first.measurements, second.measurements);

    // Another sample makes other variants: nothing is known of them.
    let other = with_loop(session(), folder.path(), async |typist: Typist| {
        typist.sees("1 Layers").await;
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        typist.press(&["q"]);
    });
    assert!(other.measurements.base.is_none());
}

const QUICK: &str = r#"
schema = "strata.recipe/1"
name = "quick"
method = "rtn"
[allocate]
formats = ["w8a8", "w4a8"]
[formats]
ssm = "w8a8"
mlp = "w8a8"
attention = "w8a8"
moe = "w8a8"
embedding = "w8a16"
head = "w8a8"
"#;

#[test]
fn a_variant_found_by_measurement_is_measured_found_made_and_known_when_it_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut session = small_session();
    // Round to nearest: its donors take no time.
    let recipe = folder.path().join("quick.toml");
    std::fs::write(&recipe, QUICK).unwrap();
    session.variants = vec![VariantSpec { bits: Some(5.0), ..VariantSpec::new("found", recipe.display().to_string()) }];
    session.calibration.length = 32;
    let first = with_loop(session.clone(), folder.path(), async |typist: Typist| {
        typist.sees("M measures what each part loses").await;
        typist.press(&["M"]);
        typist.sees("✓ measure what the parts lose by quick").await;
        typist.sees("checked plans").await;
        // The front, a smaller budget, and back.
        typist.press(&["1", "a", "left", "left"]);
        typist.sees("plans by budget").await;
        typist.press(&["esc", "R"]);
        typist.sees("✓ evaluate base, found").await;
        typist.press(&["q"]);
    });
    let draft = first.document.draft();
    let made = first.measurements.of(draft).unwrap();
    let found = first.losses.found().unwrap().as_ref().unwrap();
    assert_eq!(made.plan, *found, "the plan on the screen was the one that was made");
    assert!(made.result.as_ref().unwrap().bits_per_weight <= 5.0);

    let second = with_loop(session, folder.path(), async |typist: Typist| {
        typist.sees("against base").await;
        typist.sees("checked plans").await;
        typist.press(&["q"]);
    });
    assert_eq!(second.measurements, first.measurements);
}
