//! Keys typed through the real loop with the real engine on the demo.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use crossterm::event::Event as Input;
use futures_util::stream::poll_fn;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::fixture::{render, text};
use crate::engine::{Engine, EngineOptions};
use crate::error::Result;
use crate::session::paths::Places;
use crate::session::remembered::Remembered;
use crate::session::{EvaluateSpec, Session, UiSpec};
use crate::tui::document::Document;
use crate::tui::effects::Outside;
use crate::tui::event_loop::{EventLoop, Signal};
use crate::tui::keys;
use crate::tui::measurements::Origin;
use crate::tui::state::{State, Strip};
use crate::tui::terminal::Screen;
use crate::tui::theme::Theme;
use crate::tui::tree::Column;

/// A screen in memory that the script can read.
struct MemoryScreen {
    text: Rc<RefCell<String>>,
    clipboard: Rc<RefCell<String>>,
    frames: Rc<Cell<usize>>,
}

impl Screen for MemoryScreen {
    fn draw(&mut self, state: &State) -> Result<()> {
        self.frames.set(self.frames.get() + 1);
        *self.text.borrow_mut() = text(&render(state, self.size()?));
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        Ok(())
    }

    fn suspend(&mut self) -> Result<()> {
        Ok(())
    }

    fn set_mouse(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn copy(&mut self, text: &str) -> Result<&'static str> {
        *self.clipboard.borrow_mut() = text.to_owned();
        Ok("the clipboard")
    }

    fn resume(&mut self) -> Result<()> {
        Ok(())
    }

    fn lose(&mut self, _: Option<&Path>) -> Result<()> {
        Ok(())
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn size(&self) -> Result<(u16, u16)> {
        Ok((160, 48))
    }
}

/// Types keys and reads the screen.
pub struct Typist {
    keys: UnboundedSender<io::Result<Input>>,
    signals: UnboundedSender<Signal>,
    screen: Rc<RefCell<String>>,
    clipboard: Rc<RefCell<String>>,
    frames: Rc<Cell<usize>>,
}

impl Typist {
    pub fn press(&self, script: &[&str]) {
        for key in script {
            self.keys.send(Ok(Input::Key(keys::event(key).unwrap()))).unwrap();
        }
    }

    fn type_text(&self, text: &str) {
        for letter in text.chars() {
            self.press(&[&letter.to_string()]);
        }
    }

    pub fn text(&self) -> String {
        self.screen.borrow().clone()
    }

    pub async fn sees(&self, what: &str) {
        for _ in 0..12000 {
            if self.screen.borrow().contains(what) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never seen: {what}\n{}", self.screen.borrow());
    }

    async fn sees_not(&self, what: &str) {
        for _ in 0..3000 {
            if !self.screen.borrow().contains(what) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("still seen: {what}\n{}", self.screen.borrow());
    }
}

/// Runs the loop on `session` while `script` types, with `folder` as the user's; returns the state at the end.
pub fn with_loop(session: Session, folder: &Path, script: impl AsyncFnOnce(Typist)) -> State {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (engine, events) = Engine::start(&EngineOptions { threads: Some(2), ..EngineOptions::default() }).unwrap();
    let mut state = State::new(Document::open(session).unwrap(), None, Theme::find(Some("ansi16"), false).unwrap(), false, (160, 48));
    let places = Places { data: folder.join("data"), state: folder.join("state") };
    state.queue.store = places.variants();
    state.queue.data = places.data.clone();
    state.queue.journal = Some(places.evaluations());
    let (keys, mut typed) = unbounded_channel();
    let (signal_sender, signals) = unbounded_channel();
    let screen = Rc::new(RefCell::new(String::new()));
    let (clipboard, frames) = (Rc::new(RefCell::new(String::new())), Rc::new(Cell::new(0)));
    let (copied, drawn) = (clipboard.clone(), frames.clone());
    let typist = Typist { keys, signals: signal_sender.clone(), screen: screen.clone(), clipboard, frames };
    let input = poll_fn(move |context| typed.poll_recv(context));
    let screen = MemoryScreen { text: screen, clipboard: copied, frames: drawn };
    let outside = Outside::new(places, Vec::new(), false);
    let workbench = EventLoop { state, screen, engine: &engine, events, signals, outside };
    let outcome = runtime.block_on(async { tokio::join!(workbench.run(input), script(typist)).0 });
    outcome.unwrap().0
}

/// The demo's session, cut down to a second's work.
pub fn small_session() -> Session {
    let mut session = Session::demo().unwrap();
    session.calibration.sequences = 1;
    session.calibration.length = 16;
    session.evaluate =
        EvaluateSpec { tasks: vec!["piqa".into()], limit: Some(4), windows: 1, window_tokens: 32, speed: false, ..session.evaluate };
    session
}

#[test]
fn browse_plan_undo_run_compare_save_reload() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fit.toml");
    let state = with_loop(small_session(), folder.path(), async |typist: Typist| {
        typist.sees("1 Layers").await;
        typist.sees("clip loses").await;
        typist.press(&["j", "j", "s", "4", "esc", "g", "6", "u"]);
        typist.sees("kind:ssm w4a8").await;
        typist.press(&["A"]);
        typist.sees("✓ quantize phase1").await;
        typist.sees("✓ evaluate base, phase1, phase2").await;
        typist.sees("against base").await;
        typist.press(&["5", "c"]);
        typist.sees("95% interval").await;
        typist.sees_not("comparing row by row").await;
        typist.sees("B−A most").await;
        typist.press(&["ctrl-s", "ctrl-u"]);
        typist.type_text(path.to_str().unwrap());
        typist.press(&["enter"]);
        typist.sees("saved ").await;
        typist.press(&["q"]);
    });
    let reloaded = Session::read(&path).unwrap();
    assert_eq!(reloaded, state.document.session());
    assert_eq!(reloaded.variants[0].overrides.len(), 1);
    // The saved file's variants are those that were measured on screen.
    for (spec, draft) in reloaded.variants.iter().zip(&state.document.drafts) {
        let (recipe, plan) = spec.plan(&state.document.layout).unwrap();
        let measured = state.measurements.find(&Origin::new(&recipe, &plan, &spec.overrides)).unwrap();
        assert!(measured.result.is_some() && plan == draft.plan);
    }
    assert_eq!(state.measurements.base.as_ref().unwrap().variant, "base");

    // Opened again and run again: found on disk, not made again.
    let state = with_loop(reloaded, folder.path(), async |typist: Typist| {
        typist.press(&["R"]);
        typist.sees("found on disk, verified").await;
        typist.sees("✓ evaluate base, phase1").await;
        typist.press(&["q"]);
    });
    assert!(!state.document.unsaved());
}

#[test]
fn how_the_screen_looked_is_kept_from_one_start_to_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let remembered = folder.path().join("state/workbench.toml");
    let left = with_loop(small_session(), folder.path(), async |typist: Typist| {
        typist.press(&["o", "O", "K", "m", "ctrl-t", ":"]);
        typist.type_text("theme");
        typist.press(&["enter"]);
        typist.sees("automatic").await;
        typist.press(&["j", "j", "enter", "2", "t", "j", "j", "enter", "z"]);
        typist.sees("A100 40GB").await;
        typist.press(&["q"]);
    });
    let mut state = State::new(Document::open(small_session()).unwrap(), None, left.theme.clone(), false, (160, 48));
    state.recollect(&Remembered::read(&remembered));
    let looks = |state: &State| {
        let layers = &state.layers;
        let list = (layers.sort, layers.descending, layers.grouped, layers.strip);
        (list, state.mouse, state.zoom, state.focus, state.plan.gpu.name, state.chosen_theme.clone())
    };
    assert_eq!(looks(&state), looks(&left));
    assert!(!state.mouse && state.layers.grouped && state.layers.strip != Strip::default());
    let choice = state.chosen_theme.as_deref();
    assert_eq!((choice, left.theme.name.as_str()), (Some("light"), "light"));

    // What a session's file says of the screen comes first.
    let ui = UiSpec { layers_sort: Some("bytes".into()), ..UiSpec::default() };
    let session = Session { ui, ..small_session() };
    let mut state = State::new(Document::open(session).unwrap(), None, left.theme.clone(), false, (160, 48));
    state.recollect(&Remembered::read(&remembered));
    assert_eq!((state.layers.sort, state.layers.grouped), (Some(Column::Bytes), false));
}

#[test]
fn a_running_job_is_cancelled_and_the_engine_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut session = small_session();
    session.calibration.sequences = 8;
    session.calibration.length = 256;
    with_loop(session, folder.path(), async |typist: Typist| {
        typist.press(&["R"]);
        typist.sees("quantize      ").await;
        typist.press(&["x", "y"]);
        typist.sees("✗ quantize phase1  cancelled").await;
        typist.sees("✗ evaluate base, phase1  cancelled").await;
        typist.press(&["q"]);
    });
}

#[test]
fn opening_another_session_and_a_bad_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.toml");
    std::fs::write(
        &path,
        "schema = \"strata.session/1\"\n[model]\nid = \"demo\"\n[[variant]]\nname = \"mine\"\nrecipe = \"phase2\"\n\
        [[variant]]\nname = \"other\"\nrecipe = \"phase1\"\n",
    )
    .unwrap();
    let state = with_loop(small_session(), folder.path(), async |typist: Typist| {
        typist.press(&["ctrl-o"]);
        typist.type_text("/nowhere/at-all.toml");
        typist.press(&["enter"]);
        typist.sees("/nowhere/at-all.toml failed").await;
        typist.press(&["ctrl-o"]);
        typist.type_text(path.to_str().unwrap());
        typist.press(&["enter"]);
        typist.sees("variant mine").await;
        typist.press(&["]"]);
        typist.sees("variant other").await;
        // Opened again, it is edited where it was left.
        typist.press(&["ctrl-o"]);
        typist.type_text(path.to_str().unwrap());
        typist.press(&["enter"]);
        typist.sees("opened ").await;
        typist.sees("variant other").await;
        typist.press(&["q"]);
    });
    assert_eq!(state.document.draft().name, "other");
    assert_eq!(state.path.as_deref(), Some(path.as_path()));
}

#[test]
fn nothing_is_drawn_while_nothing_happens_and_a_signal_ends_it() {
    let folder = tempfile::tempdir().unwrap();
    with_loop(small_session(), folder.path(), async |typist: Typist| {
        // The weights of the block under the cursor were read: rtn and clip at four widths.
        typist.sees("clip loses").await;
        typist.sees_not("rounding …").await;
        let before = typist.frames.get();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(typist.frames.get(), before, "frames without a cause");
        typist.signals.send(Signal::Terminate).unwrap();
    });
}

#[test]
fn select_plan_compare_flips_export_copy_and_playground() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flips.csv");
    let mut session = small_session();
    session.evaluate.limit = Some(40);
    let state = with_loop(session, folder.path(), async |typist: Typist| {
        // A slice of the first block, a kind and a preset; all of it undone again.
        typist.press(&["l", "j", "j", "8", "h", "+"]);
        typist.type_text("att");
        typist.press(&["enter", "y", "esc", "2", "P", "2"]);
        typist.sees("formats of phase2").await;
        typist.press(&["H", "g", "esc", "u", "]", "R"]);
        typist.sees("✓ evaluate base, phase2").await;
        typist.press(&["5", "c"]);
        typist.sees("95% interval").await;
        typist.sees_not("comparing row by row").await;
        typist.press(&["f"]);
        typist.sees("right to wrong").await;
        typist.press(&["e", "ctrl-u"]);
        typist.type_text(path.to_str().unwrap());
        typist.press(&["enter"]);
        typist.sees("wrote ").await;
        typist.press(&["p"]);
        typist.sees("over bytes of the linears").await;
        typist.press(&["esc", "Y"]);
        typist.sees("copied to the clipboard").await;
        assert!(typist.clipboard.borrow().starts_with("| variant | linears |"), "{}", typist.clipboard.borrow());
        typist.press(&["f6", "enter"]);
        typist.type_text("The");
        typist.press(&["enter"]);
        typist.sees("nats").await;
        typist.press(&["1", "f4", "i"]);
        typist.sees("outlier").await;
        typist.press(&["q", "y"]);
    });
    let exported = std::fs::read_to_string(&path).unwrap();
    assert!(exported.starts_with("task,index,right,A,B\n"), "{exported}");
    assert_eq!(exported.lines().count() - 1, state.compared().unwrap().comparison.flips.len());
    assert_eq!(state.playground.names, ["base", "phase2"]);
    assert!(!state.playground.divergence.is_empty() && state.playground.divergence.iter().any(|kld| *kld > 0.0));
    assert!(!state.looks.inputs.is_empty());
}
