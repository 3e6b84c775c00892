//! The table of rules: what a scan can find. `docs/verify.md` has the same table, which a test holds it to.

use serde::{Serialize, Serializer};

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// May be meant; a careful user looks.
    Warning,
    /// Do not load the file.
    Error,
}

impl Severity {
    /// As SARIF and `--json` write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One thing that can be found.
#[derive(Debug)]
pub struct Rule {
    /// It never changes, nor is it given to another rule.
    pub id: &'static str,
    /// A short name.
    pub name: &'static str,
    /// What a finding weighs.
    pub severity: Severity,
    /// What is found, in a sentence.
    pub text: &'static str,
}

impl Serialize for &'static Rule {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.id)
    }
}

macro_rules! rules {
    ($($constant:ident $id:literal $name:literal $severity:ident $text:literal;)*) => {
        $(
            #[doc = $text]
            pub static $constant: Rule =
                Rule { id: $id, name: $name, severity: Severity::$severity, text: $text };
        )*
        /// All rules, by id.
        pub static RULES: &[&Rule] = &[$(&$constant),*];
    };
}

rules! {
    HASH_OF_FILE "QV001" "file-hash" Error "A file has not the size or SHA-256 that the manifest has.";
    HASH_OF_TENSOR "QV002" "tensor-hash" Error "A tensor has not the type, shape or SHA-256 that the manifest has.";
    NOT_THERE "QV003" "file-missing" Error "A file or tensor of the manifest is missing.";
    NOT_LISTED "QV004" "file-extra" Error "A file or tensor is not in the manifest.";
    MANIFEST "QV005" "manifest-malformed" Error "The manifest is none, or names files outside its directory.";

    MALFORMED "QV101" "malformed" Error "A file contradicts its own format: sizes, offsets, overlaps, types, what a reader must refuse.";
    LIMIT "QV102" "limit" Error "A file demands more than the limits allow.";
    TRAILING "QV103" "trailing-bytes" Warning "Bytes behind the last tensor belong to nothing.";
    POLYGLOT "QV104" "polyglot" Error "Bytes that belong to no tensor are those of another format: an archive, a program, a page.";
    HOLE "QV105" "hole" Warning "More bytes than padding needs lie between tensors and belong to none.";
    PADDING "QV106" "padding" Warning "Padding between tensors is not zero.";
    ORDER "QV107" "tensor-order" Warning "Tensors are listed in another order than they lie in; llama.cpp refuses this.";

    SHARD_MISSING "QV201" "shard-missing" Error "A shard is missing.";
    SHARD_FOREIGN "QV202" "shard-foreign" Error "A shard says that it belongs to another model.";
    SHARD_STRAY "QV203" "shard-stray" Warning "A file of weights belongs to no index and no set: a loader that takes all takes it too.";

    KEY_MISSING "QV301" "key-missing" Error "A key that every loader needs is missing.";
    KEY_TYPE "QV302" "key-type" Error "A key has a value of the wrong type.";
    KEY_RANGE "QV303" "key-range" Error "A key has a value that no model can have.";
    KEY_IMPLAUSIBLE "QV304" "key-implausible" Warning "A key has a value that is hardly meant.";
    ARCHITECTURE "QV305" "architecture-unknown" Note "The architecture is not one that is known here, so that its own keys were not checked.";
    TENSOR_MISSING "QV306" "tensor-missing" Error "A tensor that every loader needs is missing.";
    TENSOR_SHAPE "QV307" "tensor-shape" Error "A tensor's shape contradicts the metadata.";

    NAME_CONTROL "QV401" "name-control" Error "A name holds control characters, which terminals obey.";
    NAME_PATH "QV402" "name-path" Error "A name would lead out of a directory if it were used as a file name.";
    NAME_DECEPTIVE "QV403" "name-deceptive" Warning "A name holds characters that are not seen or turn text round.";

    VOCAB_LENGTH "QV501" "vocab-length" Error "Lists of the vocabulary differ in length from its tokens.";
    VOCAB_ID "QV502" "vocab-id" Warning "The id of a special token is not one of the vocabulary.";
    VOCAB_DUPLICATE "QV503" "vocab-duplicate" Error "A token appears twice; llama.cpp stops at such a vocabulary.";
    VOCAB_BYTE "QV504" "vocab-byte" Error "A byte token names no byte.";
    VOCAB_LONG "QV505" "vocab-long-token" Warning "A token is longer than any text that a tokenizer learns.";
    VOCAB_TYPE "QV506" "vocab-type" Warning "A token's type is none of llama.cpp's.";
    VOCAB_MERGE "QV507" "vocab-merge" Warning "A merge is no pair, or makes or takes what is no token.";
    VOCAB_UNLOADABLE "QV508" "vocab-unloadable" Error "A loader of the vocabulary would stop or never come back.";
    VOCAB_SCORE "QV509" "vocab-score" Warning "A token's score is not a number.";
    VOCAB_EMPTY "QV510" "vocab-empty" Error "The vocabulary has no tokens.";

    TEMPLATE_RENDER "QV601" "template-render" Note "A chat template did not render with any of the sample conversations.";
    TEMPLATE_BOUNDS "QV602" "template-bounds" Error "A chat template takes more time, memory or output than any template may.";
    TEMPLATE_ATTRIBUTE "QV603" "template-attribute" Error "A chat template reaches for Python's internals, which lets it out of its sandbox.";
    TEMPLATE_CODE "QV604" "template-code" Error "A chat template names modules or functions that run programs, read files or open connections.";
    TEMPLATE_IMPORT "QV605" "template-import" Error "A chat template includes or imports other files.";
    TEMPLATE_LOOP "QV606" "template-loop" Warning "A chat template counts to a number that no conversation needs.";
    TEMPLATE_ADDRESS "QV607" "template-address" Note "A chat template holds a network address.";

    PICKLE_GLOBAL "QV701" "pickle-global" Error "A pickle names a function or class that tensors do not need; unpickling calls it.";
    PICKLE_OPCODE "QV702" "pickle-opcode" Error "A pickle does not parse, or uses instructions that tensors do not need.";

    CONFIG "QV801" "config-malformed" Error "A JSON file beside the weights is no JSON, or not of the form it should have.";
    REMOTE_CODE "QV802" "remote-code" Warning "The model wants code of its own to be run (auto_map).";
    PROGRAM "QV803" "program-file" Note "A program lies beside the weights.";
    CHECKPOINT "QV804" "checkpoint-inconsistent" Error "Tensors and configuration contradict each other.";

    TENSOR_NAN "QV901" "tensor-nan" Error "A tensor holds values that are no numbers.";
    TENSOR_INF "QV902" "tensor-inf" Error "A tensor holds infinite values.";
    SCALE_NOT_FINITE "QV903" "scale-not-finite" Error "A block's scale or minimum is NaN or infinite.";
    SCALE_NEGATIVE "QV904" "scale-negative" Warning "A block's scale is negative, which no encoder of its type writes.";
    SCALE_HUGE "QV905" "scale-huge" Warning "A block's scale makes weights in the thousands or more.";
    CODE_GRID "QV906" "code-out-of-grid" Warning "A code is none that an encoder of its type writes.";
    TENSOR_ZERO "QV907" "tensor-zero" Warning "A matrix is zero throughout.";
    VECTOR_ZERO "QV908" "vector-zero" Note "A vector is zero throughout, as biases may be.";
    TENSOR_NOISE "QV909" "tensor-implausible" Warning "Many values are subnormal or above 1e10: bytes of another type, or damage.";
    IMPORTANCE "QV910" "importance-invalid" Error "An importance matrix holds values that are negative or not finite.";
    PACKAGE "QV990" "check-failed" Error "A check of a .qpack file or a Core ML package failed.";
}

#[cfg(test)]
mod tests {
    use super::RULES;

    #[test]
    fn ids_are_unique_and_in_order() {
        assert!(RULES.windows(2).all(|p| p[0].id < p[1].id));
        let mut names: Vec<_> = RULES.iter().map(|r| r.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|p| p[0] != p[1]));
    }
}
