//! Results as one page that needs no network: sortable tables and plots in SVG. Start with [`page`].

use std::fmt::Write;

use super::report::Table;
use super::{plot, report};
use crate::eval::ModelResult;

const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");

/// A page with `tables` under their titles and the plots that `results` allow.
pub fn page(title: &str, tables: &[(&str, Table)], results: &[ModelResult]) -> String {
    let mut body = format!("<h1>{}</h1>\n", escape(title));
    let named = |title: &str, plot: Option<String>| plot.map(|plot| (title.to_owned(), plot));
    let plots = named("Accuracy with 95 % intervals", plot::accuracy(results))
        .into_iter()
        .chain(plot::sizes(results))
        .chain(named("Error by block", plot::block_errors(results)))
        .chain(named("Speed", plot::speed(results)));
    for (title, plot) in plots {
        section(&mut body, &title, &plot);
    }
    for (title, rows) in tables.iter().filter(|(_, table)| table.rows().len() > 1) {
        section(&mut body, title, &table(rows));
    }
    let mut evidence: Vec<String> =
        results.iter().filter(|result| !result.provenance.backend.is_empty()).map(|result| report::evidence(&result.provenance)).collect();
    evidence.dedup();
    if !evidence.is_empty() {
        let lines: String = evidence.iter().map(|line| escape(line)).collect::<Vec<_>>().join("<br>\n");
        section(&mut body, "Measured on", &format!("<p>{lines}</p>\n"));
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{body}<script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        escape(title)
    )
}

fn section(body: &mut String, title: &str, content: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(body, "<section>\n<h2>{}</h2>\n{content}</section>", escape(title));
}

fn table(table: &Table) -> String {
    let (heads, rows) = table.rows().split_first().map_or((&[][..], &[][..]), |(heads, rows)| (heads.as_slice(), rows));
    let mut html = String::from("<div class=\"scroll\"><table>\n<thead>\n");
    row(&mut html, heads, "th", " scope=\"col\" tabindex=\"0\"");
    html.push_str("</thead>\n<tbody>\n");
    for cells in rows {
        row(&mut html, cells, "td", "");
    }
    html.push_str("</tbody>\n</table></div>\n");
    html
}

fn row(html: &mut String, cells: &[String], tag: &str, attributes: &str) {
    html.push_str("<tr>");
    for cell in cells {
        let _ = write!(html, "<{tag}{attributes}>{}</{tag}>", escape(cell));
    }
    html.push_str("</tr>\n");
}

/// `text` where HTML and SVG expect text or a quoted attribute.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::import;

    #[test]
    fn names_are_escaped_and_nothing_is_loaded() {
        let text = r#"{"model_name": "<script>x</script>", "results": {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}"#;
        let record = import::harness(text.as_bytes(), "r.json").unwrap();
        let mut other = record.result.clone();
        (other.variant, other.weight_bytes) = ("a & \"b\"".into(), 1000);
        let results = [record.result, other];
        let page = page("title <b>", &[("Results", super::super::report::comparison(&results))], &results);
        assert!(page.contains("title &lt;b&gt;") && page.contains("a &amp; &quot;b&quot;"));
        assert!(!page.contains("<script>x") && page.contains("<svg"));
        for outside in ["src=", "href=", "url(", "@import", "fetch("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
