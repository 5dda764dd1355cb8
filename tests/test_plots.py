"""The figure of effectiveness against speed: its content and legibility."""
from simplified_tinybert.ranking import plots


def drawn(points):
    """Return the axes, and the bounding boxes of the legend's texts by name."""
    figure = plots.effectiveness_figure(points, "nDCG@10", "title")
    figure.canvas.draw()
    axes, = figure.axes
    return axes, {text.get_text(): text.get_window_extent() for text in axes.get_legend().get_texts()}


def test_names_cover_neither_each_other_nor_the_points():
    points = [plots.Point("Teacher 12/768", 0.65, 5.0, True), plots.Point("student 6/768", 0.64, 10.0),
              plots.Point("student 3/384", 0.61, 98.0), plots.Point("student 3/384 --bf16", 0.6105, 151.0),
              plots.Point("standard KD 3/384", 0.600, 99.0), plots.Point("student 3/384 --int8", 0.609, 191.0),
              plots.Point("BM25", 0.52), plots.Point("BM25 + RM3", 0.525)]
    axes, boxes = drawn(points)
    assert boxes.keys() == {point.name for point in points}
    listed = list(boxes.items())
    for number, (name, box) in enumerate(listed):
        assert all(not box.overlaps(other) for _, other in listed[number + 1:]), name
        assert axes.bbox.x1 <= box.x0 and box.x1 <= axes.figure.bbox.x1, name
        assert 0 <= box.y0 and box.y1 <= axes.figure.bbox.y1, name
    handles = axes.get_legend().legend_handles
    assert len({(handle.get_color(), handle.get_marker(), handle.get_linestyle()) for handle in handles}) == len(points)


def test_figures_of_odd_systems():
    """A single point; names that look like formulas or start with _; a teacher with another name; equal values."""
    assert drawn([plots.Point("$x_1$ ü", 0.5, 3.0, True)])[1].keys() == {"$x_1$ ü (teacher)"}
    axes, boxes = drawn([plots.Point("_a", 0.5, 1e5), plots.Point("b", 0.5, 2.0), plots.Point("c", 0.5)])
    assert boxes.keys() == {"_a", "b", "c"}
    low, high = axes.get_xlim()
    labels = [text.get_text() for tick, text in zip(axes.get_xticks(), axes.get_xticklabels()) if low <= tick <= high]
    assert labels == ["1", "10", "100", "1,000", "10,000", "100,000"]


def test_ticks():
    assert plots.plain_ticks(1.5, 60) == ([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    assert plots.plain_ticks(0.5, 2000)[1] == ["1", "10", "100", "1,000"]
