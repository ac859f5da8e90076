//! Losses, predictions and plans by budget: keys through `update`, without an engine.

use std::path::PathBuf;

use super::fixture::{evaluated, fresh, manifest, press, render, text, tick, type_text, with_losses};
use crate::engine::{Event, Job, JobId};
use crate::error::Error;
use crate::format::{Format, Plan};
use crate::tui::bench::losses;
use crate::tui::keys;
use crate::tui::losses::{Key, Solved};
use crate::tui::message::{Effect, Msg};
use crate::tui::queue::{Purpose, Status};
use crate::tui::state::{Pane, State};
use crate::tui::update::update;

fn bits(plan: &Plan) -> String {
    plan.blocks.iter().map(|format| format.weight_bits().to_string().replace("16", "f")).collect()
}

fn screen(state: &State) -> String {
    text(&render(state, (160, 48)))
}

fn line(state: &State, label: &str) -> String {
    screen(state).lines().find(|line| line.contains(label)).unwrap_or_default().to_owned()
}

fn submitted(effects: &[Effect]) -> Option<&Job> {
    effects.iter().find_map(|effect| if let Effect::Submit(job) = effect { Some(&**job) } else { None })
}

#[test]
fn what_is_not_measured_is_said_and_can_be_measured() {
    let mut state = fresh((160, 48));
    tick(&mut state, 1);
    assert!(line(&state, "│ KLD").contains("looking for what was measured"));
    let key = Key::of(state.document.draft());
    update(&mut state, Msg::LossesRecalled { model: "demo".into(), key: key.clone(), found: Ok(None) });
    assert!(line(&state, "│ KLD").contains("not predicted yet: M measures what each part loses"));
    press(&mut state, &["a"]);
    assert!(screen(&state).contains("Measure first?"));
    let effects = press(&mut state, &["m"]);
    let opened = effects.iter().any(|effect| matches!(effect, Effect::OpenRun { purpose: Purpose::Measure, .. }));
    assert!(opened && matches!(submitted(&effects), Some(Job::Sensitivity(_))), "{effects:?}");
    assert_eq!(state.focus, Pane::Run);
    press(&mut state, &["a"]);
    let said = screen(&state);
    assert!(said.contains("is being measured: a works when that is done") && !said.contains("Measure first?"), "{said}");

    // What does not fit is said with its reason; an answer about another model is none.
    let mut state = fresh((160, 48));
    tick(&mut state, 1);
    let wrong = || Err(Error::input("the sensitivities of demo that there are do not hold here: they were measured on other tokens"));
    update(&mut state, Msg::LossesRecalled { model: "other".into(), key: key.clone(), found: wrong() });
    assert!(line(&state, "│ KLD").contains("looking"));
    update(&mut state, Msg::LossesRecalled { model: "demo".into(), key, found: wrong() });
    assert!(line(&state, "│ KLD").contains("M measures it; so far on other tokens"));
}

#[test]
fn every_edit_predicts_the_divergence_in_its_own_frame() {
    let mut state = with_losses(fresh((160, 48)));
    let losses = losses(&state.document);
    let expected = |state: &State| {
        let plan = &state.document.draft().plan;
        format!("~{:.2e} nats a token", losses.predict(plan, &state.document.layout).unwrap())
    };
    let before = expected(&state);
    assert!(line(&state, "│ KLD").contains(&before), "{}", line(&state, "│ KLD"));
    press(&mut state, &["G", "4"]);
    let after = expected(&state);
    assert!(before != after && line(&state, "│ KLD").contains(&after));
    assert!(line(&state, "│ KLD").contains("by 2 checked plans"));
    assert!(state.message.as_ref().unwrap().text.contains("KLD ~+"), "{:?}", state.message);
    // The column is the block's share, and what stays as it is loses nothing.
    let block = losses.blocks(&state.document.draft().plan, &state.document.layout)[11].unwrap();
    let row = line(&state, " 11  - MLP");
    assert!(row.contains(&format!("~{block:.1e}")), "{block:.1e}: {row}");
    press(&mut state, &["6"]);
    assert_eq!(state.losses.block(11), Some(0.0));
    // Losses of embedding and head hold for the formats that they were measured in.
    press(&mut state, &["2", "h", "1"]);
    let key = Key::of(state.document.draft());
    update(&mut state, Msg::LossesRecalled { model: "demo".into(), key, found: Ok(Some(Box::new(losses))) });
    assert!(line(&state, "│ KLD").contains("; ends w8a16, w8a8"), "{}", line(&state, "│ KLD"));
    // A format that was not measured is not predicted.
    press(&mut state, &["u", "1", "g", ":"]);
    type_text(&mut state, "formats preset");
    press(&mut state, &["esc"]);
    state.document.set_format(&["block:3".parse().unwrap()], "w4a16g32".parse().unwrap(), "edit").unwrap();
    press(&mut state, &["j"]);
    assert!(line(&state, "│ KLD").contains("a format of block 3 was not measured"), "{}", line(&state, "│ KLD"));
}

#[test]
fn the_strip_is_coloured_by_losses() {
    let mut state = with_losses(fresh((160, 48)));
    press(&mut state, &["m"]);
    let strip = screen(&state).lines().nth(3).unwrap().to_owned();
    assert!(strip.contains('▁') && strip.contains('█'), "{strip}");
    press(&mut state, &["m", "m"]);
    assert!(screen(&state).lines().nth(3).unwrap().contains("888888888888"));
}

#[test]
fn a_budget_moves_over_the_front_and_its_plan_is_taken_and_undone() {
    let mut state = with_losses(fresh((80, 24)));
    press(&mut state, &["a"]);
    assert_eq!(state.focus, Pane::Plan);
    let opened = state.plan().clone();
    assert!(state.allocating.is_some() && bits(&opened).contains('8'));
    press(&mut state, &["left"; 40]);
    let moved = state.plan().clone();
    assert!(state.document.footprint.linear_bytes(&moved) < state.document.footprint.linear_bytes(&opened));
    assert_eq!(bits(&state.document.draft().plan), "888888888888", "the variant is as it was");
    let shown = text(&render(&state, (80, 24)));
    assert!(shown.contains(&bits(&moved)), "the strip shows the plan under the budget\n{shown}");
    // A plan is never worse than a uniform one of its bytes, by the prediction.
    press(&mut state, &["=", "ctrl-u"]);
    type_text(&mut state, "4.15");
    press(&mut state, &["enter"]);
    let found = &state.allocating.as_ref().unwrap().found;
    let uniform = losses(&state.document)
        .predict(&Plan { blocks: vec![Format::W4A8; 12], ..state.document.draft().plan.clone() }, &state.document.layout);
    assert!(found.bits_per_weight <= 4.15 && found.predicted_kld < uniform.unwrap());
    press(&mut state, &["=", "ctrl-u"]);
    type_text(&mut state, "1.0");
    press(&mut state, &["enter"]);
    assert!(state.message.as_ref().unwrap().text.contains("smallest that is possible"));
    let taken = state.plan().clone();
    press(&mut state, &["enter"]);
    assert!(state.allocating.is_none());
    assert_eq!(state.document.draft().plan, taken);
    assert_eq!(bits(state.plan()), bits(&taken));
    press(&mut state, &["u"]);
    assert_eq!(bits(&state.document.draft().plan), "888888888888");
    // esc leaves it, and so does an edit; selected blocks keep their formats.
    press(&mut state, &["a", "left", "left", "esc"]);
    assert_eq!(bits(state.plan()), "888888888888");
    press(&mut state, &["1", "g", "space", "6", "esc", "g", "space", "a"]);
    assert_eq!(state.plan().blocks[0], Format::W16A16, "what stays as it is needs no measurement");
    press(&mut state, &["esc", "1", "g", "4", "a"]);
    press(&mut state, &["left"; 3]);
    assert_eq!(state.plan().blocks[0], Format::W4A8);
    assert!(text(&render(&state, (80, 24))).contains("1 pinned"));
    press(&mut state, &["8"]);
    assert!(state.allocating.is_none() && state.plan().blocks[0] == Format::W8A8);
}

#[test]
fn the_front_is_found_beside_the_loop_and_an_edit_meanwhile_gives_it_up() {
    let mut state = with_losses(fresh((80, 24)));
    let key = |state: &mut State, name: &str| update(state, Msg::Key(keys::event(name).unwrap()));
    let asked = |effects: Vec<Effect>| {
        effects.into_iter().find_map(|effect| if let Effect::Solve(asked) = effect { Some(Solved::new(*asked)) } else { None })
    };
    let front = asked(key(&mut state, "a")).unwrap();
    assert_eq!((state.focus, state.allocating.is_none()), (Pane::Plan, true));
    assert!(screen(&state).contains("finding the plans of every budget"));
    assert!(asked(key(&mut state, "a")).is_none(), "one at a time");
    assert!(asked(update(&mut state, Msg::Solved(Box::new(front)))).is_none(), "what was asked for twice is found once");
    assert!(state.allocating.is_some());

    // What keeps its format makes another front; the edit that comes in between leaves none to wait for.
    press(&mut state, &["esc", "1", "g", "space"]);
    let front = asked(key(&mut state, "a")).unwrap();
    key(&mut state, "4");
    update(&mut state, Msg::Solved(Box::new(front)));
    assert!(state.allocating.is_none() && state.document.draft().plan.blocks[0] == Format::W4A8);
}

#[test]
fn every_block_is_explained() {
    let mut state = with_losses(fresh((80, 24)));
    press(&mut state, &["a", "=", "ctrl-u"]);
    type_text(&mut state, "5");
    press(&mut state, &["enter", "w"]);
    let shown = text(&render(&state, (80, 24)));
    for words in ["Block 0 (ssm): why these bits", "where it saves most", "in_proj", "↓ w", "↑ w", "a MB: "] {
        assert!(shown.contains(words), "{words}\n{shown}");
    }
    press(&mut state, &["esc", "j", "j", "j", "j", "j", "w"]);
    assert!(text(&render(&state, (80, 24))).contains("3 linears, tied"));
    // Formats that differ in their activations alone have no price.
    press(&mut state, &["esc", "f", "down", "down", "enter", "w"]);
    assert!(text(&render(&state, (80, 24))).contains(" same bytes, "));
    // Also of a plan that no front gave.
    press(&mut state, &["esc", "esc", "1", "6", "w"]);
    assert!(text(&render(&state, (80, 24))).contains("stays as in the checkpoint and loses nothing"));
}

/// The demo's session with a variant whose formats are found by measurement.
fn allocated() -> State {
    let mut state = fresh((80, 24));
    state.document.add("phase3-allocated").unwrap();
    with_losses(state)
}

#[test]
fn a_variant_found_by_measurement_shows_its_plan_and_takes_pins_and_a_budget() {
    let mut state = allocated();
    let (budget, found) = (state.document.draft().plan.clone(), state.plan().clone());
    assert_ne!(budget.blocks, found.blocks, "not the budget's formats, but what is found within its bytes");
    assert!(state.document.footprint.linear_bytes(&found) <= state.document.footprint.linear_bytes(&budget));
    // A pin is a rule even where the budget has this format already.
    press(&mut state, &["2", "1", "g", "j", "8"]);
    assert_eq!(state.plan().blocks[1], Format::W8A8);
    assert_eq!(state.document.draft().overrides.len(), 1);
    press(&mut state, &["P", "1"]);
    assert!(state.message.as_ref().unwrap().text.contains("found by measurement"));
    // The budget that is taken is the variant's own, in the file too.
    press(&mut state, &["a", "left", "left", "left"]);
    let taken = state.plan().clone();
    press(&mut state, &["enter"]);
    assert_eq!(*state.plan(), taken);
    let spec = state.document.session().variants[1].clone();
    assert!(spec.bits.is_some_and(|bits| bits < 6.4));
    press(&mut state, &["u", "u"]);
    assert_eq!((state.plan(), state.document.draft().bits), (&found, None));
    press(&mut state, &["U", "U", ":"]);
    type_text(&mut state, "reset");
    press(&mut state, &["enter"]);
    assert_eq!((state.plan(), state.document.draft().overrides.len()), (&found, 0));
}

#[test]
fn a_variant_found_by_measurement_runs_and_keeps_what_was_found() {
    let mut state = allocated();
    press(&mut state, &["g", "8"]);
    let effects = press(&mut state, &["R"]);
    let Some(Job::Quantize(job)) = submitted(&effects) else { panic!("{effects:?}") };
    let allocate = job.allocate.as_ref().unwrap();
    assert_eq!((allocate.pins.len(), allocate.spec.formats.len()), (1, 4));
    let mut manifest = manifest(&state, 1, 0.01);
    manifest.plan = Plan { blocks: vec![Format::W3A8; 12], ..manifest.plan };
    let id = JobId(1);
    update(&mut state, Msg::Submitted(Ok(id)));
    let path = PathBuf::from("made");
    update(
        &mut state,
        Msg::Engine(Event::Quantized { id, name: "phase3-allocated".into(), path, manifest: Box::new(manifest), reused: false }),
    );
    let effects = update(&mut state, Msg::Engine(Event::Finished { id, outcome: Ok(()) }));
    let Some(Job::Evaluate(request)) = submitted(&effects) else { panic!("{effects:?}") };
    assert_eq!(request.models[0].path, "made");
    update(&mut state, Msg::Submitted(Ok(JobId(2))));
    let evaluated = Box::new(evaluated("phase3-allocated", 2_000_000, 3.1, 0.01));
    update(&mut state, Msg::Engine(Event::Evaluated { id: JobId(2), evaluated }));
    assert_eq!(bits(state.plan()), "333333333333", "what was made, not what would be found now");
    assert!(state.measurements.of(state.document.draft()).unwrap().result.is_some());
    assert!(state.error(3).unwrap().1, "its errors are those of the plan on the screen");
    press(&mut state, &["1", "j", "8"]);
    assert_ne!(bits(state.plan()), "333333333333", "another pin is another variant");
}

#[test]
fn measurements_wait_in_the_queue_like_other_runs() {
    let mut state = fresh((160, 48));
    press(&mut state, &["M", "R", "M"]);
    update(&mut state, Msg::Submitted(Ok(JobId(1))));
    let titles = |state: &State| state.queue.runs.iter().map(|run| run.title.clone()).collect::<Vec<_>>();
    assert_eq!(titles(&state), ["losses by phase1", "phase1", "losses by phase1"]);
    press(&mut state, &["K"]);
    assert_eq!(titles(&state)[1], "losses by phase1");
    let effects = press(&mut state, &["p"]);
    assert!(matches!(effects[..], [Effect::Pause(true)]));
    let effects = press(&mut state, &["p", "k", "x", "y"]);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Cancel(JobId(1)))), "{effects:?}");
    update(&mut state, Msg::Engine(Event::Finished { id: JobId(1), outcome: Err(Error::cancelled()) }));
    assert_eq!(*state.queue.runs[0].status(), Status::Cancelled);
    state.queue.cursor = 0;
    press(&mut state, &["r"]);
    let last = state.queue.runs.last().unwrap();
    assert!(last.title == "losses by phase1" && *last.status() == Status::Waiting && last.purpose == Purpose::Measure);
    // What only shows something is tried again, too.
    press(&mut state, &["f4", "i", "3"]);
    state.queue.cursor = state.queue.runs.len() - 1;
    press(&mut state, &["x", "y", "r"]);
    assert_eq!(*state.queue.runs.last().unwrap().status(), Status::Waiting);
}
