//! Every command of the workbench, in the order of the help.

use super::actions::{allocate, files, formats, jobs, looks, navigate, plan, playground, results, screen, select, variants};
use super::commands::Command;
use super::state::{Pane, State};

const EVERYWHERE: &[Pane] = &[];
const PLANNING: &[Pane] = &[Pane::Layers, Pane::Plan, Pane::Block];

#[allow(clippy::unnecessary_wraps, reason = "what the table asks for")]
fn always(_: &State) -> Result<(), &'static str> {
    Ok(())
}

macro_rules! command {
    ($id:literal, $title:literal, $hint:expr, [$($key:literal),*], $panes:expr, $enabled:expr, $run:expr, $help:literal) => {
        Command { id: $id, title: $title, help: $help, hint: $hint, keys: &[$($key),*], panes: $panes, enabled: $enabled, run: $run }
    };
}

/// The table.
#[rustfmt::skip]
pub static TABLE: [Command; 114] = [
    // Formats
    command!("format-w4a8", "Format w4a8", Some((1, "w4a8")), ["4"], PLANNING, always, formats::w4a8, "Gives the selected blocks 4-bit weights and 8-bit activations."),
    command!("format-w8a8", "Format w8a8", Some((1, "w8a8")), ["8"], PLANNING, always, formats::w8a8, "Gives the selected blocks 8-bit weights and activations."),
    command!("format-w16a16", "Format w16a16", Some((1, "w16a16")), ["6"], PLANNING, always, formats::w16a16, "Leaves the selected blocks as they are in the checkpoint."),
    command!("format-w8a16", "Format w8a16", None, [], PLANNING, always, formats::w8a16, "Gives the selected blocks 8-bit weights and float activations."),
    command!("format-w4a16", "Format w4a16", None, [], PLANNING, always, formats::w4a16, "Gives the selected blocks 4-bit weights and float activations."),
    command!("format-w3a16", "Format w3a16", None, [], PLANNING, always, formats::w3a16, "Gives the selected blocks 3-bit weights and float activations."),
    command!("format-w3a8", "Format w3a8", None, [], PLANNING, always, formats::w3a8, "Gives the selected blocks 3-bit weights and 8-bit activations."),
    command!("format-w2a16", "Format w2a16", None, [], PLANNING, always, formats::w2a16, "Gives the selected blocks 2-bit weights and float activations."),
    command!("format-w2a8", "Format w2a8", None, [], PLANNING, always, formats::w2a8, "Gives the selected blocks 2-bit weights and 8-bit activations."),
    command!("narrower", "Narrower format", Some((3, "narrower")), [">"], PLANNING, always, formats::narrower, "Gives the selected blocks the next narrower format: w16a16, w8a16, w8a8, w4a16, w4a8, and round."),
    command!("wider", "Wider format", None, ["<"], PLANNING, always, formats::wider, "Gives the selected blocks the next wider format."),
    command!("copy-format", "Copy formats", None, ["y"], &[Pane::Layers, Pane::Block], always, formats::copy, "Copies the format of the block under the cursor, or the formats of the selection in their order."),
    command!("paste-format", "Paste formats", None, ["p"], &[Pane::Layers, Pane::Block], formats::can_paste, formats::paste, "Gives a copied format to the selected blocks; several, to the blocks from the cursor on."),
    command!("preset", "Formats of a preset", Some((4, "preset")), ["P"], PLANNING, always, formats::preset, "Takes the formats of phase 1, 2 or 3, of a recipe, or what the inventory suggests (attention and the SSM block in front of it kept wide)."),
    command!("embedding", "Format of the embedding", Some((5, "embedding")), ["e"], &[Pane::Plan], always, formats::embedding, "Chooses the format of the embedding."),
    command!("head", "Format of the head", Some((5, "head")), ["h"], &[Pane::Plan], always, formats::head, "Chooses the format of the output head."),
    command!("suggested", "Suggested formats", None, [], EVERYWHERE, always, formats::suggested, "Takes the plan that the layer inventory suggests: SSM at w4a8, but w8a8 in front of attention; the rest at w8a8."),
    command!("reset", "Back to the recipe", None, [], EVERYWHERE, always, formats::reset, "Takes all changes of the variant back to what its recipe says."),
    command!("undo", "Undo", Some((4, "undo")), ["u"], EVERYWHERE, formats::can_undo, formats::undo, "Takes the last edit back."),
    command!("redo", "Redo", None, ["U", "ctrl-r"], EVERYWHERE, formats::can_redo, formats::redo, "Does again what was undone."),
    command!("history", "History of edits", None, ["H"], EVERYWHERE, always, formats::history, "Lists every edit, to go back or forward to."),
    command!("gpu", "Predict for a GPU", Some((3, "GPU")), ["t"], &[Pane::Plan], always, plan::gpu, "Chooses the GPU that time per token, prefill and context are predicted for."),
    command!("beside", "Plan beside", Some((3, "beside")), ["b"], &[Pane::Plan], variants::has_others, plan::beside, "Puts another variant's plan beside this one, with the differences; once more takes it away."),
    // Allocation
    command!("allocate", "Find a plan", Some((2, "allocate")), ["a"], EVERYWHERE, always, allocate::open, "Draws the front of plans: what each budget buys. Selected blocks keep their formats."),
    command!("budget-less", "Smaller budget", Some((0, "less")), ["left"], &[Pane::Plan], allocate::is_open, allocate::less, "Moves the budget a step down; the plan on the screen follows."),
    command!("budget-more", "Larger budget", Some((0, "more")), ["right"], &[Pane::Plan], allocate::is_open, allocate::more, "Moves the budget a step up; the plan on the screen follows."),
    command!("budget", "Type a budget", Some((0, "type it")), ["="], &[Pane::Plan], allocate::is_open, allocate::budget, "Moves the budget to bits a weight (`4.5`), bytes of the model (`6 GiB`), a loss (`2e-5 nats`), or what fits on a GPU (`RTX 4090`)."),
    command!("plan-formats", "Activations of the plans", Some((3, "activations")), ["f"], &[Pane::Plan], allocate::is_open, allocate::formats, "Chooses whether plans use int8 activations, float ones, or any."),
    command!("take-plan", "Take the plan", Some((0, "take it")), ["enter"], &[Pane::Plan], allocate::is_open, allocate::apply, "Gives the variant the plan under the budget; a variant whose formats are found by measurement takes the budget."),
    command!("leave-plan", "Leave the budget", Some((0, "leave")), ["esc"], &[Pane::Plan], allocate::is_open, allocate::leave, "Leaves the variant as it is."),
    command!("why", "Why these bits", Some((4, "why")), ["w"], EVERYWHERE, always, allocate::why, "Says of each part of the block what it loses, what the next narrower and wider format would change, and what a megabyte is worth elsewhere."),
    command!("strip", "Colours of the strip", Some((6, "strip")), ["m"], &[Pane::Layers], always, allocate::strip, "Shows in the strip the bits of the weights, what each block is predicted to lose, or its measured error."),
    // Selection
    command!("select", "Select the block", Some((2, "select")), ["space"], &[Pane::Layers], always, select::toggle, "Selects the block under the cursor, or lets it go, and moves on."),
    command!("select-range", "Select a range", Some((5, "range")), ["v"], &[Pane::Layers], always, select::range, "Selects from here to where the cursor goes; once more ends the range."),
    command!("select-kind", "Select a kind", Some((3, "kind")), ["s"], &[Pane::Layers], always, select::kind, "Selects every listed block of the kind under the cursor."),
    command!("select-all", "Select all", None, ["ctrl-a"], &[Pane::Layers], always, select::all, "Selects every listed block."),
    command!("clear", "Clear selection and filter", None, ["esc"], &[Pane::Layers], always, select::clear, "Lets the selection go; once more, the filter."),
    command!("select-pattern", "Select by pattern", None, ["+"], &[Pane::Layers], always, select::pattern, "Adds the blocks that meet a kind, a format, numbers or a module's name to the selection."),
    command!("order", "Sort the blocks", Some((6, "sort")), ["o"], &[Pane::Layers], always, select::sort, "Sorts the blocks by the next column, and after the last one as in the model."),
    command!("reverse-order", "Reverse the blocks", None, ["O"], &[Pane::Layers], always, select::reverse, "Turns the order of the blocks around."),
    command!("group", "Group by kind", Some((6, "group")), ["K"], &[Pane::Layers], always, select::group, "Lists the blocks of a kind together, or all as in the model."),
    command!("open-block", "Open the block", Some((4, "open")), ["l", "right"], &[Pane::Layers], always, navigate::open, "Lists the modules and slices of the block, which take formats of their own."),
    command!("close-block", "Close the block", None, ["h", "left"], &[Pane::Layers], always, navigate::close, "Lists the block as one line again."),
    command!("filter", "Filter blocks", Some((3, "find")), ["/"], &[Pane::Layers], always, select::filter, "Narrows the list to a kind, a format, block numbers or letters of a module's name: `ssm w8`, `3-9`, `qproj`."),
    command!("look", "Look at the block", Some((5, "block")), ["enter"], &[Pane::Layers], always, screen::look, "Shows the block under the cursor in the Block pane."),
    command!("back", "Back to the layers", Some((1, "layers")), ["esc", "enter"], &[Pane::Block], always, screen::layers, "Goes back to the list of layers."),
    command!("observe", "Observe the inputs", Some((2, "inputs")), ["i"], &[Pane::Block], always, looks::observe, "Runs the float model over the calibration sample and shows the largest input of every channel."),
    // Variants
    command!("next-variant", "Next variant", Some((5, "next variant")), ["]"], EVERYWHERE, variants::has_others, variants::next, "Edits the next variant."),
    command!("previous-variant", "Previous variant", None, ["["], EVERYWHERE, variants::has_others, variants::previous, "Edits the previous variant."),
    command!("new-variant", "New variant", Some((1, "new")), ["n"], &[Pane::Plan], always, variants::new, "Adds a variant of a recipe: phase 1, 2 or 3."),
    command!("duplicate-variant", "Duplicate the variant", Some((5, "duplicate")), ["y"], &[Pane::Plan], always, variants::duplicate, "Adds a copy of the variant and edits it."),
    command!("rename-variant", "Rename the variant", Some((4, "rename")), ["r"], &[Pane::Plan], always, variants::rename, "Gives the variant another name."),
    command!("delete-variant", "Delete the variant", Some((5, "delete")), ["D", "delete"], &[Pane::Plan], variants::has_others, variants::delete, "Takes the variant out of the session, after asking."),
    // Jobs
    command!("run", "Run the variant", Some((2, "run")), ["R"], EVERYWHERE, always, jobs::run, "Quantizes the variant being edited, then evaluates it beside the base."),
    command!("run-all", "Run all variants", Some((2, "run all")), ["A"], EVERYWHERE, always, jobs::run_all, "Quantizes every variant of the session, then evaluates them beside the base."),
    command!("quantize", "Only quantize the variant", None, [], EVERYWHERE, always, jobs::quantize, "Quantizes the variant being edited and does not evaluate it."),
    command!("measure", "Measure what the parts lose", None, ["M"], EVERYWHERE, always, allocate::measure, "Measures what each part of the model loses in each format, under the steps of the variant being edited: the ground of predicted KLD and of plans."),
    command!("cancel", "Cancel", Some((1, "cancel")), ["x"], EVERYWHERE, jobs::can_cancel, jobs::cancel, "Stops the run under the cursor of the Run pane, elsewhere the one that runs, after asking. What it has finished is kept."),
    command!("pause", "Pause or go on", Some((2, "pause")), ["p"], &[Pane::Run], jobs::is_busy, jobs::pause, "Makes the job at hand stand still at its next step and starts no other, or lets them go on."),
    command!("retry", "Run it again", Some((2, "retry")), ["r"], &[Pane::Run], jobs::can_retry, jobs::retry, "Puts the run under the cursor, which is over, into the queue again. What it has finished is not made again."),
    command!("move-down", "Move the run down", Some((5, "move")), ["J"], &[Pane::Run], jobs::can_move, jobs::move_down, "Lets the run under the cursor wait for the one behind it."),
    command!("move-up", "Move the run up", None, ["K"], &[Pane::Run], jobs::can_move, jobs::move_up, "Puts the run under the cursor before the one in front of it."),
    command!("log-level", "Level of the log", Some((6, "level")), ["l"], &[Pane::Run], always, jobs::log_level, "Shows all lines of the log, or only warnings and errors, or only errors."),
    command!("runs", "Runs of all processes", Some((3, "runs")), ["v"], &[Pane::Run], always, jobs::runs, "Lists the runs on this machine, those without a screen too: follow, cancel, go on with, forget."),
    command!("clear-jobs", "Clear finished jobs", Some((3, "clear")), ["c"], &[Pane::Run], always, jobs::clear, "Takes jobs that are over off the list."),
    // Results
    command!("side-a", "Make it A", Some((2, "A")), ["a"], &[Pane::Results], always, results::side_a, "Makes the row under the cursor A of the comparison and of the playground."),
    command!("side-b", "Make it B", Some((2, "B")), ["b"], &[Pane::Results], always, results::side_b, "Makes the row under the cursor B of the comparison and of the playground."),
    command!("compare", "Compare A with B", Some((1, "compare")), ["c"], &[Pane::Results], always, results::compare, "Shows A against B: tasks with intervals and flips, divergence, size, errors of the blocks; once more the table."),
    command!("flips", "Rows that flipped", Some((2, "flips")), ["f"], &[Pane::Results], always, results::flips, "Shows the rows that A has right and B wrong, or the other way round, with their questions."),
    command!("plot", "Plot size and loss", Some((2, "plot")), ["p"], &[Pane::Results], always, results::plot, "Plots divergence or accuracy over size, and the line of the variants that no other beats."),
    command!("ordinate", "Other axis", None, ["y"], &[Pane::Results], always, results::ordinate, "Plots accuracy instead of divergence, and back."),
    command!("table", "Table of results", None, ["esc"], &[Pane::Results], always, results::table, "Goes back to the table."),
    command!("filter-results", "Filter the results", Some((4, "find")), ["/"], &[Pane::Results], always, results::filter, "Shows the variants whose name, recipe or formats have the words that are typed."),
    command!("export", "Export the view", Some((4, "export")), ["e"], &[Pane::Results], always, results::export, "Writes what is shown into a .csv, .md or .json file."),
    command!("sort", "Sort by the next column", Some((3, "sort")), ["s"], &[Pane::Results], always, results::sort, "Sorts the variants by the next column, and after the last one as in the session."),
    command!("reverse", "Reverse the order", None, ["S"], &[Pane::Results], always, results::reverse, "Turns the order of the variants around."),
    command!("differences", "Differences", Some((5, "differences")), ["d"], &[Pane::Results], always, results::differences, "Shows or hides the lines of differences from the base, in points."),
    command!("columns-right", "Columns to the right", Some((5, "columns")), ["l", "right"], &[Pane::Results], always, results::columns_right, "Shows the columns further to the right."),
    command!("columns-left", "Columns to the left", None, ["h", "left"], &[Pane::Results], always, results::columns_left, "Shows the columns further to the left."),
    command!("edit-result", "Edit this variant", Some((4, "edit")), ["enter"], &[Pane::Results], always, results::edit, "Edits the variant of the row under the cursor."),
    // Playground
    command!("prompt", "Prompt both models", Some((1, "prompt")), ["enter", "i"], &[Pane::Playground], always, playground::prompt, "Lets A and B of the results go on from one prompt, side by side."),
    command!("token-left", "Token to the left", None, ["h", "left"], &[Pane::Playground], always, playground::left, "Looks at the token before."),
    command!("token-right", "Token to the right", Some((2, "token")), ["l", "right"], &[Pane::Playground], always, playground::right, "Looks at the next token."),
    command!("parting", "Where the texts part", Some((1, "parting")), ["p"], &[Pane::Playground], always, playground::parting, "Looks at the first token that differs."),
    // Moving
    command!("down", "Down", None, ["j", "down"], EVERYWHERE, always, navigate::down, "Moves the cursor down; scrolls the log in the Run pane."),
    command!("up", "Up", None, ["k", "up"], EVERYWHERE, always, navigate::up, "Moves the cursor up."),
    command!("page-down", "Page down", None, ["pgdn", "ctrl-d"], EVERYWHERE, always, navigate::page_down, "Moves a page down."),
    command!("page-up", "Page up", None, ["pgup", "ctrl-u"], EVERYWHERE, always, navigate::page_up, "Moves a page up."),
    command!("first", "To the start", None, ["g", "home"], EVERYWHERE, always, navigate::first, "Moves to the first row."),
    command!("last", "To the end", None, ["G", "end"], EVERYWHERE, always, navigate::last, "Moves to the last row."),
    // Screen
    command!("next-pane", "Next pane", Some((5, "pane")), ["tab"], EVERYWHERE, always, screen::next_pane, "Goes to the next pane."),
    command!("previous-pane", "Previous pane", None, ["shift-tab"], EVERYWHERE, always, screen::previous_pane, "Goes to the previous pane."),
    command!("pane-layers", "Layers", None, ["1", "f1"], EVERYWHERE, always, screen::layers, "Goes to the list of blocks."),
    command!("pane-plan", "Plan", None, ["2", "f2"], EVERYWHERE, always, screen::plan, "Goes to the plan: variants, predicted size, overrides."),
    command!("pane-run", "Run", None, ["3", "f3"], EVERYWHERE, always, screen::run, "Goes to the jobs."),
    command!("pane-block", "Block", None, ["4", "f4"], EVERYWHERE, always, screen::block, "Goes to the block under the cursor. Where `4` sets a format, `f4` or `enter` does."),
    command!("pane-results", "Results", None, ["5", "f5"], EVERYWHERE, always, screen::results, "Goes to the results."),
    command!("pane-playground", "Playground", None, ["6", "f6"], EVERYWHERE, always, playground::pane, "Goes to the playground: one prompt, two models. Where `6` sets a format, `f6` does."),
    command!("zoom", "Zoom", Some((5, "zoom")), ["z"], EVERYWHERE, always, screen::zoom, "Lets the pane fill the screen, or shows all panes again."),
    command!("theme", "Theme", None, [], EVERYWHERE, always, screen::theme, "Chooses the colours."),
    command!("mouse", "Mouse on or off", None, ["ctrl-t"], EVERYWHERE, always, screen::mouse, "Takes clicks and the wheel, or leaves them to the terminal, to select text with."),
    command!("copy", "Copy", None, ["Y"], EVERYWHERE, always, screen::copy, "Copies what the pane is about to the clipboard: the variant as TOML, the table, the texts."),
    command!("tour", "First steps", None, [], EVERYWHERE, always, screen::tour, "Shows the first steps again."),
    command!("redraw", "Redraw", None, ["ctrl-l"], EVERYWHERE, always, screen::redraw, "Draws the whole screen again."),
    // Session
    command!("save", "Save the session", Some((4, "save")), ["ctrl-s"], EVERYWHERE, always, files::save, "Saves the session to its file, keeping the file's comments; asks for a path when it has none."),
    command!("save-as", "Save the session as", None, [], EVERYWHERE, always, files::save_as, "Saves the session to another file."),
    command!("open", "Open a session", None, ["ctrl-o"], EVERYWHERE, files::can_open, files::open, "Opens another session file."),
    command!("recent", "Open a recent session", None, ["ctrl-e"], EVERYWHERE, files::can_open, files::recent, "Chooses among the session files that were opened or saved last."),
    command!("changes", "Changes since the last save", None, ["C"], EVERYWHERE, always, files::changes, "Shows how the variants and their plans differ from the session's file."),
    command!("messages", "Messages", None, ["E"], EVERYWHERE, always, screen::messages, "Shows what was said in the status line and in the corner, errors too."),
    command!("suspend", "Suspend", None, ["ctrl-z"], EVERYWHERE, always, screen::suspend, "Stops strata and goes back to the shell; `fg` comes back."),
    command!("palette", "Command palette", Some((5, "command")), [":"], EVERYWHERE, always, screen::palette, "Finds a command by name."),
    command!("help", "Help", Some((5, "help")), ["?"], EVERYWHERE, always, screen::help, "Lists the keys; type to search."),
    command!("quit", "Quit", Some((5, "quit")), ["q", "ctrl-c"], EVERYWHERE, always, files::quit, "Leaves; asks when something is not saved or a job runs."),
];
