//! Check a dump against a golden, in Rust with the standard library alone.
//!
//!     read_golden GOLDEN.safetensors MINE.safetensors    every stage that both have
//!     read_golden GOLDEN.safetensors STAGE MINE.f32      one stage, raw float32, low byte first
//!
//! It prints OK, or the first number that differs, stages in the order of the golden. It ends with 0
//! (the same), 1 (different) or 2 (bad use, or a file that cannot be read). Names and layouts have
//! to be the golden's, and numbers computed in float32; `npvlm compare` takes others.

use std::process::ExitCode;

/// Of the root mean square of a stage: far above what float32 rounds off, below any mistake.
const LIMIT: f64 = 1e-4;

struct Stage {
    name: String,
    whole: bool,
    values: Vec<f64>,
}

/// The header of a safetensors file is JSON of one kind: names, types, whole numbers.
struct Cursor<'a> {
    rest: &'a [u8],
}

type Read<T> = Result<T, String>;

impl Cursor<'_> {
    fn peek(&mut self) -> Read<u8> {
        self.rest = self.rest.trim_ascii_start();
        self.rest.first().copied().ok_or("has a header that ends too early".into())
    }

    fn take(&mut self, wanted: u8) -> Read<bool> {
        let found = self.peek()? == wanted;
        self.rest = &self.rest[found as usize..];
        Ok(found)
    }

    fn expect(&mut self, wanted: u8) -> Read<()> {
        match self.take(wanted)? {
            true => Ok(()),
            false => Err("has a header that is none of safetensors".into()),
        }
    }

    fn text(&mut self) -> Read<String> {
        self.expect(b'"')?;
        let end = self.rest.iter().position(|&b| b == b'"' || b == b'\\').unwrap_or(0);
        let (inside, rest) = self.rest.split_at(end);
        self.rest = rest;
        match self.take(b'"')? {
            true => Ok(String::from_utf8_lossy(inside).into_owned()),
            false => Err("has a name that is not plain".into()),
        }
    }

    fn number(&mut self) -> Read<usize> {
        self.peek()?;
        let end = self.rest.iter().position(|b| !b.is_ascii_digit()).unwrap_or(0);
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        let digits = String::from_utf8_lossy(digits);
        digits.parse().map_err(|_| "has no number where one should be".into())
    }

    fn numbers(&mut self) -> Read<Vec<usize>> {
        self.expect(b'[')?;
        let mut found = Vec::new();
        while !self.take(b']')? {
            found.push(self.number()?);
            if !self.take(b',')? {
                self.expect(b']')?;
                break;
            }
        }
        Ok(found)
    }

    fn skip_notes(&mut self) -> Read<()> {
        self.expect(b'{')?;
        let (mut inside, mut escaped) = (false, false);
        while inside || !self.take(b'}')? {
            let byte = *self.rest.first().ok_or("has a header that ends too early")?;
            inside ^= byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            self.rest = &self.rest[1..];
        }
        Ok(())
    }

    fn stage(&mut self, name: String, data: &[u8]) -> Read<Stage> {
        let (mut dtype, mut shape, mut place) = (String::new(), Vec::new(), Vec::new());
        self.expect(b'{')?;
        loop {
            let key = self.text()?;
            self.expect(b':')?;
            match key.as_str() {
                "dtype" => dtype = self.text()?,
                "shape" => shape = self.numbers()?,
                _ => place = self.numbers()?,
            }
            if !self.take(b',')? {
                break;
            }
        }
        self.expect(b'}')?;
        let cut = "is cut off or has a header of another file";
        let bytes = match place[..] {
            [begin, end] => data.get(begin..end).ok_or(cut)?,
            _ => return Err(cut.into()),
        };
        let stage = Stage::new(name, &dtype, bytes)?;
        let count = shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
        match count == Some(stage.values.len()) {
            true => Ok(stage),
            false => Err(cut.into()),
        }
    }
}

impl Stage {
    fn new(name: String, dtype: &str, bytes: &[u8]) -> Read<Stage> {
        let wide = |b: &[u8]| <[u8; 8]>::try_from(b).unwrap();
        let narrow = |b: &[u8]| <[u8; 4]>::try_from(b).unwrap();
        let values = match dtype {
            "F32" => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(narrow(b)) as f64).collect(),
            "F64" => bytes.chunks_exact(8).map(|b| f64::from_le_bytes(wide(b))).collect(),
            "I64" => bytes.chunks_exact(8).map(|b| i64::from_le_bytes(wide(b)) as f64).collect(),
            "I32" => bytes.chunks_exact(4).map(|b| i32::from_le_bytes(narrow(b)) as f64).collect(),
            "U8" => bytes.iter().map(|&b| b as f64).collect(),
            _ => return Err("has numbers that are not F32, F64, I64, I32 or U8".into()),
        };
        Ok(Stage { name, whole: !dtype.starts_with('F'), values })
    }

    /// What is wrong with another dump's stage, in words. Whole numbers have to be equal.
    fn difference(&self, mine: &Stage) -> Option<String> {
        let (name, count, found) = (&self.name, self.values.len(), mine.values.len());
        if count != found {
            return Some(format!("{name}: expected {count} numbers, found {found}"));
        }
        let size = (self.values.iter().map(|x| x * x).sum::<f64>() / count as f64).sqrt();
        let most = if self.whole { 0.0 } else { LIMIT * size };
        let pairs = self.values.iter().zip(&mine.values);
        for (i, (expected, found)) in pairs.enumerate() {
            let missed = (found - expected).abs();
            if missed.is_nan() || missed > most {
                let error = missed / size;
                return Some(format!(
                    "{name} at number {i}: expected {expected}, found {found}, \
                     relative error {error:.2e}"
                ));
            }
        }
        None
    }
}

fn read_file(path: &str) -> Read<Vec<u8>> {
    std::fs::read(path).map_err(|error| format!("{path} cannot be read ({})", error.kind()))
}

fn read_safetensors(path: &str) -> Read<Vec<Stage>> {
    let file = read_file(path)?;
    parse(&file).map_err(|reason| format!("{path} {reason}"))
}

fn parse(file: &[u8]) -> Read<Vec<Stage>> {
    let none = "is no safetensors file";
    let (length, rest) = file.split_first_chunk::<8>().ok_or(none)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| none)?;
    let (header, data) = rest.split_at_checked(length).ok_or(none)?;
    let mut cursor = Cursor { rest: header };
    let mut stages = Vec::new();
    cursor.expect(b'{')?;
    while !cursor.take(b'}')? {
        let name = cursor.text()?;
        cursor.expect(b':')?;
        match name.as_str() {
            "__metadata__" => cursor.skip_notes()?,
            _ => stages.push(cursor.stage(name, data)?),
        }
        if !cursor.take(b',')? {
            cursor.expect(b'}')?;
            break;
        }
    }
    Ok(stages)
}

fn read_raw(path: &str, name: &str) -> Read<Vec<Stage>> {
    let file = read_file(path)?;
    if file.len() % 4 != 0 {
        return Err(format!("{path} has a size that is no multiple of 4, expected raw float32"));
    }
    Ok(vec![Stage::new(name.into(), "F32", &file)?])
}

/// Whether all stages in common are the same.
fn run(arguments: &[String]) -> Read<bool> {
    let (golden, mine, path) = match arguments {
        [golden, mine] => (golden, read_safetensors(mine)?, mine),
        [golden, stage, mine] => (golden, read_raw(mine, stage)?, mine),
        _ => return Err("usage: read_golden GOLDEN.safetensors [STAGE] MINE".into()),
    };
    let golden = read_safetensors(golden)?;
    let mut compared = 0;
    for stage in &golden {
        for own in mine.iter().filter(|own| own.name == stage.name) {
            if let Some(wrong) = stage.difference(own) {
                println!("DIFFERENT: {wrong}");
                return Ok(false);
            }
            compared += 1;
        }
    }
    if compared == 0 {
        return Err(format!("{path} has no stage of the golden"));
    }
    println!("OK: {compared} of the golden's {} stages compared, all the same", golden.len());
    Ok(true)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(reason) => {
            eprintln!("read_golden: {reason}.");
            ExitCode::from(2)
        }
    }
}
