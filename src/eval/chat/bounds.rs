//! What a template may take, and what is looked at before it is compiled.
//!
//! minijinja builds its tree in loops, but compiles and drops it by recursion, and works out constants anew at
//! each operator. So operators are counted first, in one walk over the tokens, and then the products of
//! constants are looked at in the tree.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use minijinja::machinery::{Token, WhitespaceConfig, ast, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// What renderings may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Instructions that one rendering may execute.
    pub steps: u64,
    /// Time of all.
    pub time: Duration,
    /// Bytes of all values that they make, whether they are still there or not.
    pub made: usize,
    /// Elements of values, and pieces of texts, that are walked through.
    pub walked: usize,
    /// Size of one value: elements, and bytes of text, of all that is in it.
    pub elements: usize,
    pub bytes: usize,
}

/// A chat: as long as a model takes, over and over.
pub(super) const CHAT: Bounds = Bounds {
    steps: 5_000_000,
    time: Duration::from_secs(10),
    made: 256 << 20,
    walked: 50_000_000,
    elements: 1 << 20,
    bytes: 16 << 20,
};

/// Short samples, for all templates of a file together.
pub(super) const SAMPLES: Bounds = Bounds {
    steps: 500_000,
    time: Duration::from_millis(1500),
    made: 64 << 20,
    walked: 8_000_000,
    elements: 1 << 18,
    bytes: 2 << 20,
};

/// Bytes of a template, and of what it writes.
pub(super) const TEMPLATE_BYTES: usize = 1 << 20;
pub(super) const OUTPUT_BYTES: usize = 16 << 20;
const VALUE_DEPTH: usize = 48;
/// Operators between two braces, and branches of `if`; real templates have fewer than a hundred.
const OPERATORS: usize = 1000;
const BRANCHES: usize = 1000;
/// Operators times tokens: each operator may work out all constants that stand beside it.
const FOLDED: usize = 16_000_000;
/// Bytes or elements of a product of constants: `'-' * 40`.
const PRODUCT: f64 = 4096.0;

pub(super) fn fail(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, why.into())
}

/// What renderings have used up.
pub(super) struct Meter {
    pub bounds: Bounds,
    made: AtomicUsize,
    walked: AtomicUsize,
    deadline: Instant,
}

/// Size of a value with all that is in it.
#[derive(Default)]
pub(super) struct Size {
    elements: usize,
    bytes: usize,
}

impl Size {
    fn add(&mut self, value: &Value, depth: usize, bounds: &Bounds) -> Result<(), Error> {
        self.elements += 1;
        self.bytes += 32 + value.as_str().map_or(0, str::len);
        if self.elements > bounds.elements || self.bytes > 2 * bounds.bytes {
            return Err(fail("makes a value that is too large"));
        }
        let kind = value.kind();
        if matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
            if depth == VALUE_DEPTH {
                return Err(fail("nests its values too deep"));
            }
            for item in value.try_iter()? {
                if kind == ValueKind::Map {
                    self.add(&value.get_item(&item)?, depth + 1, bounds)?;
                }
                self.add(&item, depth + 1, bounds)?;
            }
        }
        Ok(())
    }
}

impl Meter {
    pub fn new(bounds: Bounds) -> Arc<Self> {
        let deadline = Instant::now() + bounds.time;
        Arc::new(Self { bounds, made: AtomicUsize::new(0), walked: AtomicUsize::new(0), deadline })
    }

    /// Whether there is time left.
    pub fn tick(&self) -> Result<(), Error> {
        if Instant::now() > self.deadline { Err(fail("takes too long")) } else { Ok(()) }
    }

    /// How many bytes go in, where that is of a size, so that walking through it `times` times ends.
    pub fn take(&self, args: &[Value], times: usize) -> Result<usize, Error> {
        self.tick()?;
        let size = self.size(args)?;
        self.walk(Self::cost(&size).saturating_mul(times))?;
        Ok(size.bytes)
    }

    /// The size of all.
    pub fn size(&self, args: &[Value]) -> Result<Size, Error> {
        let mut size = Size::default();
        args.iter().try_for_each(|arg| size.add(arg, 0, &self.bounds)).map(|()| size)
    }

    /// Steps of walking through it.
    pub fn cost(size: &Size) -> usize {
        size.elements + size.bytes / 64
    }

    /// What was made, counted, and no longer lazy.
    pub fn give(&self, value: Value) -> Result<Value, Error> {
        let size = self.size(std::slice::from_ref(&value))?;
        self.walk(Self::cost(&size))?;
        self.spend(size.bytes)?;
        if value.kind() != ValueKind::Iterable {
            return Ok(value);
        }
        Ok(Value::from(value.try_iter()?.collect::<Vec<_>>()))
    }

    pub fn spend(&self, bytes: usize) -> Result<(), Error> {
        if self.made.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > self.bounds.made {
            return Err(fail("makes more values than it may"));
        }
        Ok(())
    }

    pub fn walk(&self, steps: usize) -> Result<(), Error> {
        if self.walked.fetch_add(steps, Ordering::Relaxed).saturating_add(steps) > self.bounds.walked {
            return Err(fail("walks through more values than it may"));
        }
        Ok(())
    }
}

/// Whether a template may be compiled.
///
/// # Errors
/// For what does not parse, and for what compiling would take too much.
pub(super) fn check(source: &str, ws_config: WhitespaceConfig) -> Result<(), Error> {
    count(source, ws_config)?;
    statement(&parse(source, "chat_template", SyntaxConfig, ws_config)?)
}

/// Counts what the compiler goes through by recursion.
fn count(source: &str, ws_config: WhitespaceConfig) -> Result<(), Error> {
    let (mut operators, mut tokens, mut folded) = (0, 0, 0_usize);
    let (mut branches, mut macros) = (0, 0_usize);
    let mut is_first = false;
    for token in tokenize(source, false, SyntaxConfig, ws_config) {
        let (token, _) = token?;
        let begins = std::mem::take(&mut is_first);
        tokens += 1;
        match token {
            Token::VariableStart | Token::BlockStart => {
                (operators, tokens) = (0, 0);
                is_first = matches!(token, Token::BlockStart);
            }
            Token::VariableEnd | Token::BlockEnd => folded = folded.saturating_add(operators * tokens),
            Token::Str(text) => tokens += text.len() / 32,
            Token::String(text) => tokens += text.len() / 32,
            Token::Ident("elif") if begins => branches += 1,
            Token::Ident("macro" | "call") if begins => macros += 1,
            Token::Ident("endmacro" | "endcall") if begins => macros = macros.saturating_sub(1),
            Token::Ident("and" | "or" | "not" | "in" | "is" | "if" | "else") => operators += 1,
            // What closes belongs to what opens.
            Token::TemplateData(_)
            | Token::Ident(_)
            | Token::Int(_)
            | Token::Int128(_)
            | Token::Float(_)
            | Token::Comma
            | Token::Colon
            | Token::Assign
            | Token::BracketClose
            | Token::ParenClose
            | Token::BraceClose => {}
            _ => operators += 1,
        }
        if operators > OPERATORS {
            return Err(fail(format!("has more operators than {OPERATORS} between two braces")));
        }
        if branches > BRANCHES {
            return Err(fail(format!("has more branches than {BRANCHES}")));
        }
        // Each copies what all before it have defined.
        if macros > 1 {
            return Err(fail("defines macros within macros"));
        }
        if folded > FOLDED {
            return Err(fail("has more operators than can be compiled"));
        }
    }
    Ok(())
}

type Checked = Result<(), Error>;

fn statements(all: &[ast::Stmt<'_>]) -> Checked {
    all.iter().try_for_each(statement)
}

fn statement(s: &ast::Stmt<'_>) -> Checked {
    use ast::Stmt;
    match s {
        Stmt::Template(t) => statements(&t.children),
        Stmt::EmitExpr(e) => expression(&e.expr),
        Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
        Stmt::ForLoop(l) => {
            expression(&l.iter)?;
            l.filter_expr.iter().try_for_each(expression)?;
            statements(&l.body)?;
            statements(&l.else_body)
        }
        Stmt::IfCond(i) => {
            expression(&i.expr)?;
            statements(&i.true_body)?;
            statements(&i.false_body)
        }
        Stmt::WithBlock(w) => {
            w.assignments.iter().try_for_each(|(_, value)| expression(value))?;
            statements(&w.body)
        }
        Stmt::Set(s) => expression(&s.expr),
        Stmt::SetBlock(s) => {
            s.filter.iter().try_for_each(expression)?;
            statements(&s.body)
        }
        Stmt::AutoEscape(a) => {
            expression(&a.enabled)?;
            statements(&a.body)
        }
        Stmt::FilterBlock(f) => {
            expression(&f.filter)?;
            statements(&f.body)
        }
        Stmt::Macro(m) => definition(m),
        Stmt::CallBlock(c) => {
            call(&c.call)?;
            definition(&c.macro_decl)
        }
        Stmt::Do(d) => call(&d.call),
        Stmt::Block(_) => Err(fail("has blocks, which a chat template has no use for")),
        Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {
            Err(fail("refers to other templates, of which there are none"))
        }
    }
}

fn definition(m: &ast::Macro<'_>) -> Checked {
    m.defaults.iter().try_for_each(expression)?;
    statements(&m.body)
}

fn call(c: &ast::Call<'_>) -> Checked {
    expression(&c.expr)?;
    arguments(&c.args)
}

fn arguments(args: &[ast::CallArg<'_>]) -> Checked {
    use ast::CallArg::{Kwarg, KwargSplat, Pos, PosSplat};
    args.iter().try_for_each(|arg| match arg {
        Pos(e) | Kwarg(_, e) | PosSplat(e) | KwargSplat(e) => expression(e),
    })
}

fn expression(e: &ast::Expr<'_>) -> Checked {
    use ast::Expr;
    match e {
        Expr::Var(_) | Expr::Const(_) => Ok(()),
        Expr::Slice(s) => {
            expression(&s.expr)?;
            [&s.start, &s.stop, &s.step].into_iter().flatten().try_for_each(expression)
        }
        Expr::UnaryOp(u) => expression(&u.expr),
        Expr::BinOp(b) => {
            expression(&b.left)?;
            expression(&b.right)?;
            if matches!(b.op, ast::BinOpKind::Mul) { product(&b.left, &b.right) } else { Ok(()) }
        }
        Expr::Compare(c) => {
            expression(&c.expr)?;
            c.ops.iter().try_for_each(|op| expression(&op.expr))
        }
        Expr::IfExpr(i) => {
            expression(&i.test_expr)?;
            expression(&i.true_expr)?;
            i.false_expr.iter().try_for_each(expression)
        }
        Expr::Filter(f) => {
            f.expr.iter().try_for_each(expression)?;
            arguments(&f.args)
        }
        Expr::Test(t) => {
            expression(&t.expr)?;
            arguments(&t.args)
        }
        Expr::GetAttr(g) => expression(&g.expr),
        Expr::GetItem(g) => {
            expression(&g.expr)?;
            expression(&g.subscript_expr)
        }
        Expr::Call(c) => call(c),
        Expr::List(l) => l.items.iter().try_for_each(expression),
        Expr::Map(m) => m.keys.iter().chain(&m.values).try_for_each(expression),
    }
}

/// Products of constants would be multiplied out while the template is compiled, before anything counts them.
fn product(left: &ast::Expr<'_>, right: &ast::Expr<'_>) -> Checked {
    let (Some(left), Some(right)) = (left.as_const(), right.as_const()) else { return Ok(()) };
    let times = |v: &Value| f64::try_from(v.clone()).unwrap_or(1.0);
    let len = |v: &Value| v.as_str().map(str::len).or_else(|| v.len()).map(|n| n as f64);
    let made = match (len(&left), len(&right)) {
        (Some(n), _) => n * times(&right),
        (_, Some(n)) => n * times(&left),
        _ => return Ok(()),
    };
    if made <= PRODUCT { Ok(()) } else { Err(fail("multiplies a constant text or list")) }
}
