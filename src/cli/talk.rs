//! `qconv run --chat` without a prompt: each line of stdin is a message, and is answered.

use std::io::{BufRead, IsTerminal, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use qconv::error::{Error, Result};
use qconv::eval::dialogue::Dialogue;
use qconv::eval::engine::Engine;
use qconv::eval::generate::{End, Options, Session};

use super::run::{Args, Output, context_length};
use super::ui;

const HELP: &str = "\
/reset         forget what was said
/system TEXT   another system message, and forget what was said; without TEXT, none
/help          this
/exit          leave; so do Ctrl-D, and Ctrl-C where no answer is being written
A line that ends in \\ goes on in the next. A message that begins with / has a space before it.";

/// Longest message in bytes.
const LONGEST: u64 = 16 << 20;

/// Answers lines until they end.
///
/// # Errors
/// When the model has no chat template, or cannot be executed; where no person is at the terminal,
/// also when a message cannot be answered.
pub fn run(
    args: &Args,
    model: &dyn Engine,
    options: &Options,
    stop: &AtomicBool,
    out: &Output,
) -> Result<()> {
    let mut dialogue = Dialogue::new(model, args.system.as_deref())?;
    let n_ctx = context_length(args, model, None);
    let mut session = Session::new(model, n_ctx, super::common::threads(args.threads))?;
    let person = std::io::stdin().is_terminal();
    if person && !args.quiet {
        ui::say("/help lists what can be done beside asking");
    }
    loop {
        // Nothing is lost where no answer is being written.
        ui::patience(0);
        if person {
            ui::ask("> ");
        }
        let Some(line) = read_message(person)? else { return Ok(()) };
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((&line, ""));
        match command {
            "/exit" | "/bye" | "/quit" => return Ok(()),
            "/help" | "/?" => ui::say(HELP),
            "/reset" | "/clear" => {
                dialogue.reset();
                ui::say("forgotten");
            }
            "/system" => {
                let text = rest.trim();
                dialogue.set_system((!text.is_empty()).then_some(text));
                dialogue.reset();
                ui::say("a new conversation begins");
            }
            _ if command.starts_with('/') => {
                ui::say(&format!("{command} is no command; /help lists them"));
            }
            _ if line.trim().is_empty() => {}
            _ => {
                ui::patience(1);
                let answered =
                    answer(&mut dialogue, &mut session, line.trim(), options, stop, out, args.quiet);
                stop.store(false, Ordering::Relaxed);
                match answered {
                    // A person may shorten the message.
                    Err(e) if person && e.path().is_none() => ui::error(&e.into()),
                    answered => answered?,
                }
            }
        }
    }
}

fn answer(
    dialogue: &mut Dialogue<'_>,
    session: &mut Session<'_>,
    message: &str,
    options: &Options,
    stop: &AtomicBool,
    out: &Output,
    quiet: bool,
) -> Result<()> {
    // A quarter of the context is left for the answer, if that may be so long.
    let room = (session.n_ctx() / 4).min(options.max_tokens.unwrap_or(usize::MAX));
    dialogue.ask(message);
    let (ids, forgotten) =
        dialogue.prompt_within(session.n_ctx() - room).inspect_err(|_| dialogue.take_back())?;
    if forgotten > 0 && !quiet {
        ui::say(&format!(
            "note: the context of {} tokens is full; the oldest {} forgotten (-c gives a longer one)",
            session.n_ctx(),
            if forgotten == 1 { "question is".to_string() } else { format!("{forgotten} questions are") }
        ));
    }
    let summary = session
        .generate(&ids, options, stop, &mut |text| out.piece(text))
        .inspect_err(|_| dialogue.take_back())?;
    if summary.text.is_empty() && summary.end == End::Interrupted {
        dialogue.take_back();
    } else {
        dialogue.answer(&summary.text);
    }
    out.end(&summary, false)?;
    if quiet {
        return Ok(());
    }
    match summary.end {
        End::ContextFull => ui::say(&format!(
            "note: the answer is cut, the context of {} tokens is full; -c gives a longer one, /reset an empty one",
            session.n_ctx()
        )),
        End::Length => ui::say("note: the answer is cut at the length that -n gives"),
        _ => {}
    }
    Ok(())
}

/// The next message; `None` at the end of stdin.
fn read_message(person: bool) -> Result<Option<String>> {
    let mut message = String::new();
    loop {
        let mut line = String::new();
        let left = LONGEST - message.len() as u64;
        let read = std::io::stdin().lock().take(left + 1).read_line(&mut line);
        let read = read.map_err(|e| Error::io("read", "stdin", e))?;
        if read as u64 > left {
            return Err(Error::limit(format!("a message is longer than {LONGEST} bytes")));
        }
        let text = line.strip_suffix('\n').unwrap_or(&line);
        let text = text.strip_suffix('\r').unwrap_or(text);
        let goes_on = text.strip_suffix('\\').filter(|_| line.ends_with('\n'));
        message.push_str(goes_on.unwrap_or(text));
        match goes_on {
            Some(_) => {
                message.push('\n');
                if person {
                    ui::ask(". ");
                }
            }
            None if read == 0 && message.is_empty() => return Ok(None),
            None => return Ok(Some(message)),
        }
    }
}
