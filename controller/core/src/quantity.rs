//! Kubernetes quantities as whole units: CPU in thousandths of a core, memory in MiB, both rounded up.
//!
//! Grammar: `sign? digits (. digits)? (suffix | exponent)?`, suffixes `n u m k M G T P E` and `Ki Mi Gi Ti Pi Ei`
//! (apimachinery `resource.Quantity`).

/// Longest text that is looked at, bytes; a real quantity has at most a few digits.
const MAX_LENGTH: usize = 64;

/// Why a text is no usable amount. The caller adds the field's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not in the grammar.
    #[error("{text:?} is not a quantity: write for example 512Mi, 1 or 500m")]
    NotAQuantity {
        /// What was given, cut.
        text: String,
    },
    /// Zero or less.
    #[error("{text} must be more than zero")]
    NotPositive {
        /// What was given.
        text: String,
    },
}

/// CPU in thousandths of a core, rounded up; amounts beyond `u64` stay at its end.
///
/// # Errors
/// When the text is no quantity or not positive.
pub fn cpu_millis(text: &str) -> Result<u64, QuantityError> {
    scaled(text, 1000, 1)
}

/// Memory in MiB (2^20 bytes), rounded up.
///
/// # Errors
/// As [`cpu_millis`].
pub fn memory_mib(text: &str) -> Result<u64, QuantityError> {
    scaled(text, 1, 1 << 20)
}

/// `text` × `numerator` / `denominator`, rounded up.
fn scaled(text: &str, numerator: u128, denominator: u128) -> Result<u64, QuantityError> {
    let bad = || QuantityError::NotAQuantity {
        text: text.chars().take(MAX_LENGTH).collect(),
    };
    let amount = Amount::parse(text).ok_or_else(bad)?;
    if amount.negative || amount.digits == 0 {
        return Err(QuantityError::NotPositive { text: text.to_owned() });
    }
    let (mut top, mut bottom) = (amount.digits, denominator);
    for factor in [amount.factor, numerator, power_of_ten(amount.exponent.max(0))] {
        top = top.saturating_mul(factor);
    }
    bottom = bottom.saturating_mul(power_of_ten(-amount.exponent.min(0)));
    Ok(u64::try_from(top.div_ceil(bottom)).unwrap_or(u64::MAX))
}

fn power_of_ten(exponent: i32) -> u128 {
    10_u128.saturating_pow(exponent.unsigned_abs())
}

/// digits × 10^exponent × factor.
struct Amount {
    negative: bool,
    digits: u128,
    exponent: i32,
    factor: u128,
}

impl Amount {
    fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_LENGTH {
            return None;
        }
        let (negative, rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return None;
        }
        let fraction = fraction.trim_end_matches('0');
        let all = format!("{whole}{fraction}");
        // More than 30 significant digits: nobody's amount, and it could overflow before it saturates.
        let significant = all.trim_start_matches('0');
        if significant.len() > 30 {
            return None;
        }
        let digits = if significant.is_empty() {
            0
        } else {
            significant.parse().ok()?
        };
        let scale = -i32::try_from(fraction.len()).ok()?;
        let (exponent, factor) = unit(suffix)?;
        Some(Self {
            negative,
            digits,
            exponent: scale + exponent,
            factor,
        })
    }
}

/// Power of ten and factor of a suffix.
fn unit(suffix: &str) -> Option<(i32, u128)> {
    Some(match suffix {
        "" => (0, 1),
        "n" => (-9, 1),
        "u" => (-6, 1),
        "m" => (-3, 1),
        "k" => (3, 1),
        "M" => (6, 1),
        "G" => (9, 1),
        "T" => (12, 1),
        "P" => (15, 1),
        "E" => (18, 1),
        "Ki" => (0, 1 << 10),
        "Mi" => (0, 1 << 20),
        "Gi" => (0, 1 << 30),
        "Ti" => (0, 1 << 40),
        "Pi" => (0, 1 << 50),
        "Ei" => (0, 1 << 60),
        other => {
            let exponent: i32 = other.strip_prefix(['e', 'E'])?.parse().ok()?;
            ((-18..=18).contains(&exponent)).then_some((exponent, 1))?
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("1", 1000),
            ("500m", 500),
            ("0.5", 500),
            ("1.5", 1500),
            ("1e3", 1_000_000),
            ("1m", 1),
            ("1u", 1),
            ("+2", 2000),
            (".5", 500),
            ("2.", 2000),
        ] {
            assert_eq!(cpu_millis(text), Ok(expected), "{text}");
        }
        for (text, expected) in [
            ("512Mi", 512),
            ("1Gi", 1024),
            ("536870912", 512),
            ("536870913", 513),
            ("512M", 489),
            ("1Ki", 1),
            ("900Ti", 943_718_400),
            ("16Ei", 1 << 44),
        ] {
            assert_eq!(memory_mib(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_positive_amount_is_refused_with_its_text() {
        for text in [
            "",
            "-",
            "abc",
            "1 Gi",
            "512MiB",
            "1.2.3",
            "1e",
            "1e99",
            "Mi",
            "１",
            &"9".repeat(65),
        ] {
            assert!(
                matches!(cpu_millis(text), Err(QuantityError::NotAQuantity { .. })),
                "{text}"
            );
        }
        for text in ["0", "-1", "-512Mi", "0.000", "0Mi"] {
            assert!(
                matches!(memory_mib(text), Err(QuantityError::NotPositive { .. })),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in "\\PC{0,80}") {
            let _ = cpu_millis(&text);
            let _ = memory_mib(&text);
        }

        #[test]
        fn mebibytes_and_bytes_agree(mib in 1_u64..1 << 40) {
            prop_assert_eq!(memory_mib(&format!("{mib}Mi")), Ok(mib));
            prop_assert_eq!(memory_mib(&(u128::from(mib) << 20).to_string()), Ok(mib));
        }

        #[test]
        fn cores_and_millis_agree(millis in 1_u64..1 << 50) {
            prop_assert_eq!(cpu_millis(&format!("{millis}m")), Ok(millis));
            prop_assert_eq!(cpu_millis(&format!("{}.{:03}", millis / 1000, millis % 1000)), Ok(millis));
        }
    }
}
