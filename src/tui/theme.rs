//! Colours by role, read from `themes/*.toml`. Panes name a [`Role`] and never a colour.

use std::collections::BTreeMap;
use std::path::Path;

use ratatui::style::{Color, Modifier, Style};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::format::{BlockKind, Format};

/// The themes that are compiled in, the default first.
pub const BUILT_IN: [(&str, &str); 5] = [
    ("ansi16", include_str!("../../themes/ansi16.toml")),
    ("dark", include_str!("../../themes/dark.toml")),
    ("light", include_str!("../../themes/light.toml")),
    ("mono", include_str!("../../themes/mono.toml")),
    ("high-contrast", include_str!("../../themes/high-contrast.toml")),
];

/// What a piece of the screen is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Text,
    Dim,
    Strong,
    Title,
    Border,
    BorderFocus,
    KindSsm,
    KindMlp,
    KindAttention,
    KindMoe,
    FormatW16,
    FormatW8,
    FormatW4,
    /// A figure that follows from the plan and was not measured.
    Predicted,
    Changed,
    Selected,
    Cursor,
    Good,
    Bad,
    Warning,
    Progress,
    Key,
}

impl Role {
    /// Every role with the name it has in a theme file, in the order of the enum.
    const NAMES: [(Self, &'static str); 22] = [
        (Self::Text, "text"),
        (Self::Dim, "dim"),
        (Self::Strong, "strong"),
        (Self::Title, "title"),
        (Self::Border, "border"),
        (Self::BorderFocus, "border.focus"),
        (Self::KindSsm, "kind.ssm"),
        (Self::KindMlp, "kind.mlp"),
        (Self::KindAttention, "kind.attention"),
        (Self::KindMoe, "kind.moe"),
        (Self::FormatW16, "format.w16"),
        (Self::FormatW8, "format.w8"),
        (Self::FormatW4, "format.w4"),
        (Self::Predicted, "predicted"),
        (Self::Changed, "changed"),
        (Self::Selected, "selected"),
        (Self::Cursor, "cursor"),
        (Self::Good, "good"),
        (Self::Bad, "bad"),
        (Self::Warning, "warning"),
        (Self::Progress, "progress"),
        (Self::Key, "key"),
    ];

    /// The role of a kind of block.
    pub fn of_kind(kind: BlockKind) -> Self {
        match kind {
            BlockKind::Ssm => Self::KindSsm,
            BlockKind::Mlp => Self::KindMlp,
            BlockKind::Attention => Self::KindAttention,
            BlockKind::Moe => Self::KindMoe,
        }
    }

    /// The role of a format, by the bits of its weights.
    pub fn of_format(format: Format) -> Self {
        match format.weight_bits() {
            16 => Self::FormatW16,
            8 => Self::FormatW8,
            _ => Self::FormatW4,
        }
    }
}

/// How a role is drawn, as a theme file says it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RoleStyle {
    fg: Option<String>,
    bg: Option<String>,
    bold: bool,
    dim: bool,
    italic: bool,
    underlined: bool,
    reversed: bool,
}

/// A style for every role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Theme {
    pub name: String,
    styles: Vec<Style>,
}

impl Theme {
    /// The theme that `name` names (a built-in one, or a file); without a name, `mono` when `no_color` is set and the
    /// default otherwise.
    pub fn find(name: Option<&str>, no_color: bool) -> Result<Self> {
        let name = name.unwrap_or(if no_color { "mono" } else { BUILT_IN[0].0 });
        if let Some((_, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::parse(name, text);
        }
        let path = Path::new(name);
        if !path.is_file() {
            let names = BUILT_IN.map(|(name, _)| name).join(", ");
            return Err(
                Error::input(format!("unknown theme `{name}`")).hint(format!("the themes are {names}; a theme file's path works too"))
            );
        }
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("reading", path, &error))?;
        Self::parse(name, &text)
    }

    /// Whether the user asked for no colour (<https://no-color.org>).
    pub fn no_color() -> bool {
        std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
    }

    /// Parses a theme. Roles that it leaves out look as in the default theme.
    fn parse(name: &str, text: &str) -> Result<Self> {
        let read = |text: &str| -> Result<BTreeMap<String, RoleStyle>> {
            let hint = "a role reads like title = { fg = \"cyan\", bold = true }; the folder themes/ has whole ones";
            toml::from_str(text).map_err(|error| Error::toml(&format!("theme {name}"), text, &error).hint(hint))
        };
        let (own, default) = (read(text)?, read(BUILT_IN[0].1)?);
        if let Some(unknown) = own.keys().find(|key| Role::NAMES.iter().all(|(_, role)| role != key)) {
            let names = Role::NAMES.map(|(_, role)| role).join(", ");
            return Err(Error::input(format!("theme {name} styles `{unknown}`, which is no role")).hint(format!("the roles are {names}")));
        }
        let style =
            |(_, role): (Role, &str)| own.get(role).or_else(|| default.get(role)).map_or(Ok(Style::new()), |role| style(name, role));
        Ok(Self { name: name.to_owned(), styles: Role::NAMES.into_iter().map(style).collect::<Result<_>>()? })
    }

    /// The style of a role.
    pub fn style(&self, role: Role) -> Style {
        self.styles.get(role as usize).copied().unwrap_or_default()
    }
}

fn style(theme: &str, role: &RoleStyle) -> Result<Style> {
    let color = |text: &String| {
        text.parse::<Color>().map_err(|_| {
            Error::input(format!("theme {theme} names the colour `{text}`"))
                .hint("write one of the sixteen names (`light-red`), a number from 0 to 255, or #rrggbb")
        })
    };
    let mut style = Style::new();
    style.fg = role.fg.as_ref().map(color).transpose()?;
    style.bg = role.bg.as_ref().map(color).transpose()?;
    for (on, modifier) in [
        (role.bold, Modifier::BOLD),
        (role.dim, Modifier::DIM),
        (role.italic, Modifier::ITALIC),
        (role.underlined, Modifier::UNDERLINED),
        (role.reversed, Modifier::REVERSED),
    ] {
        if on {
            style = style.add_modifier(modifier);
        }
    }
    Ok(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_themes_style_every_role_and_mono_has_no_colour() {
        for (name, text) in BUILT_IN {
            let theme = Theme::find(Some(name), false).unwrap();
            assert!(Role::NAMES.iter().all(|(_, role)| text.contains(role)), "{name} leaves a role out");
            if name == "mono" {
                assert!(theme.styles.iter().all(|style| style.fg.is_none() && style.bg.is_none()));
            }
        }
        for (index, (role, name)) in Role::NAMES.into_iter().enumerate() {
            assert_eq!(role as usize, index, "{name}");
        }
        assert_eq!(Theme::find(None, true).unwrap().name, "mono");
        assert_eq!(Theme::find(Some("dark"), true).unwrap().name, "dark", "a theme that was asked for beats NO_COLOR");
    }

    #[test]
    fn theme_files_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("my.toml");
        let find = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Theme::find(path.to_str(), false)
        };
        assert_eq!(find("bad = { fg = \"#ff0000\" }").unwrap().style(Role::Bad).fg, Some(Color::Rgb(255, 0, 0)));
        assert!(find("bda = {}").unwrap_err().message.contains("bda"));
        assert!(find("bad = { fg = \"rde\" }").unwrap_err().message.contains("rde"));
        assert!(Theme::find(Some("nope"), false).unwrap_err().hint.unwrap().contains("high-contrast"));
    }
}
