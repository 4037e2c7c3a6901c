"""Sentence pairs with which a next-sentence head is tested, written for this purpose."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAIRS", "SelfTest"]

#: Below this share a head counts as untrained; chance is one half.
_ENOUGH = 0.7


@dataclass(frozen=True)
class SelfTest:
    """Share of pairs in which the true continuation outscored another sentence, by language; chance is 0.5."""

    accuracy: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether any language that the vocabulary knows reaches 70 %."""
        return any(share >= _ENOUGH for share in self.accuracy.values())

    def __str__(self) -> str:
        if not self.accuracy:
            return "the vocabulary knows neither English nor Chinese: next sentences were not tested"
        shares = ", ".join(f"{share:.0%} in {language}" for language, share in self.accuracy.items())
        return f"true continuations outscore random sentences in {shares} of the pairs"


#: language -> (sentence, its continuation); the sentence half a list away serves as the random one.
PAIRS = {
    "English": (
        ("The bakery opens at five in the morning.", "By six the first loaves are already sold out."),
        ("The river rose all night after the storm.", "In the morning the water stood in the lower streets."),
        ("My grandfather repaired clocks for a living.", "His workshop was full of wheels, springs and ticking."),
        ("The team lost its first three matches.", "The coach then decided to change the defence."),
        ("She planted tomatoes along the southern wall.", "The plants got plenty of sun and bore fruit in July."),
        ("The spacecraft entered orbit around Mars in March.", "Its cameras sent the first pictures of the planet."),
        ("The museum bought a painting by an unknown artist.", "Experts now believe that the canvas is much older."),
        ("The price of oil fell sharply this week.", "Airlines expect to save money on fuel."),
        ("He forgot his umbrella on the train.", "The lost property office called him the next day."),
        ("The vaccine was tested on ten thousand people.", "Doctors saw only mild side effects in the patients."),
        ("The children built a castle of sand.", "A wave washed its towers away in the evening."),
        ("The new phone has a larger battery.", "According to the maker it lasts two days on one charge."),
    ),
    "Chinese": (
        ("这家面馆每天早上六点开门。", "不到七点,门口就排起了长队。"),
        ("昨天夜里下了一场大雪。", "今天早上很多公路都被封闭了。"),
        ("爷爷年轻的时候是一名木匠。", "家里的桌子和椅子都是他亲手做的。"),
        ("球队在上半场落后两球。", "下半场他们连进三球,反败为胜。"),
        ("医生建议他少吃油腻的东西。", "从那以后他每天都吃很多蔬菜。"),
        ("公司今年的利润增长了两成。", "年底员工都拿到了更多的奖金。"),
        ("这部电影讲的是一个宇航员的故事。", "演员们的表演打动了许多观众。"),
        ("她从小就喜欢弹钢琴。", "后来她考上了音乐学院。"),
        ("这座古桥建于宋朝。", "九百年来它一直横跨在河上。"),
        ("新手机的电池更大了。", "充一次电可以用整整两天。"),
        ("农民们在春天种下了水稻。", "到了秋天,田里一片金黄。"),
        ("老师让学生们写一篇作文。", "题目是《我的家乡》。"),
    ),
}
