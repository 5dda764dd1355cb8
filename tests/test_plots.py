"""The picture of effectiveness against speed: what is in it, and that it can be read."""
from simplified_tinybert.ranking import plots


def names_drawn(points):
    figure = plots.effectiveness_figure(points, "nDCG@10", "title")
    axes, = figure.axes
    return axes, {text.get_text(): text.get_window_extent() for text in axes.texts}


def test_names_in_the_picture_do_not_cover_each_other():
    points = [plots.Point("Teacher 12/768", 0.65, 5.0, True), plots.Point("student 6/768", 0.64, 10.0),
              plots.Point("student 3/384", 0.61, 98.0), plots.Point("student 3/384 --bf16", 0.6105, 151.0),
              plots.Point("standard KD 3/384", 0.600, 99.0), plots.Point("student 3/384 --int8", 0.609, 191.0),
              plots.Point("BM25", 0.52), plots.Point("BM25 + RM3", 0.525)]
    axes, boxes = names_drawn(points)
    assert boxes.keys() == {point.name for point in points}
    listed = list(boxes.items())
    for number, (name, box) in enumerate(listed):
        assert all(not box.overlaps(other) for _, other in listed[number + 1:]), name
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        for point in points:
            if point.speed:
                assert not box.contains(*axes.transData.transform((point.speed, point.value))), (name, point.name)


def test_pictures_of_odd_systems():
    """One point alone; equal values; names that another tool would take for formulas; a teacher of another name."""
    assert names_drawn([plots.Point("$x_1$ ü", 0.5, 3.0, True)])[1].keys() == {"$x_1$ ü (teacher)"}
    axes, _ = names_drawn([plots.Point("a", 0.5, 1e5), plots.Point("b", 0.5, 2.0), plots.Point("c", 0.5)])
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "1", "10", "100", "1,000", "10,000", "100,000", "1,000,000", "10,000,000"]


def test_ticks():
    assert plots.plain_ticks(1.5, 60) == ([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    assert plots.plain_ticks(0.5, 2000)[1] == ["1", "10", "100", "1,000"]
